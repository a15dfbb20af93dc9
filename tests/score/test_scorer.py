"""Results of a scoring: equal to the engine's, independent of earlier parts, and a reason for each row without one."""

from __future__ import annotations

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import cloudpickle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from letters import prepare_letters

from finlora.data.encode import encode_choices, encode_prompt
from finlora.data.sets.catalog import FORMS
from finlora.errors import ConfigError, ModelError
from finlora.inference.batch import BatchEngine
from finlora.inference.open_base import open_engine
from finlora.model.adapter_files import hash_weights_and_settings
from finlora.model.base import load_base
from finlora.model.base_files import read_base_files
from finlora.model.contract import make_contract, write_contract
from finlora.model.lora import attach_lora, save_adapter
from finlora.score.folder import ScoreFolder
from finlora.score.score_plan import describe_plan, make_plan
from finlora.score.scorer import Scorer, plan_cache
from finlora.score.table import open_table

TEXTS = [f"Profit {word} by {n} %" for n in range(7) for word in ("rose", "fell", "did not move")]


def write_table(folder, texts=TEXTS):
    path = folder / "in.csv"
    path.write_text("id,body\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(texts)))
    return path


@pytest.fixture
def plan_of(make_config, tmp_path):
    """Build a plan over a CSV file on the tiny base alone."""

    def build(*overrides, texts=TEXTS, part_rows=8, **options):
        config = make_config("model.max_seq_len=256", *overrides)
        table = open_table(write_table(tmp_path, texts), part_rows)
        settings = {"task": "fpb", "text": "body", "about": None, "threshold": None} | options
        return make_plan(config, read_base_files(config.model), None, table, **settings)

    return build


def score(plan, out, order=None):
    """Score all parts in `order`; returns the results in the order of the rows."""
    base, folder = read_base_files(plan.config.model), ScoreFolder(out)
    with folder.locked(plan.binding):
        scorer = Scorer(plan, out, plan_cache(plan, base), base)
        for number in order or range(len(plan.table.parts)):
            scorer.score(plan.table.parts[number])
        scorer.close()
        parts = plan.table.parts
        return [row for part in parts for row in folder.read_part(part.number, part.num_rows).to_pylist()]


def test_probabilities_equal_the_engines(plan_of, tmp_path):
    plan = plan_of(threshold=0.4)
    found = score(plan, tmp_path / "out.csv")
    config, base = plan.config, read_base_files(plan.config.model)
    choices = encode_choices(plan.form.choices, base.tokenizer, "raw")
    prompts = [encode_prompt(FORMS["fpb"].render(text, ""), base.tokenizer, "raw") for text in TEXTS]
    with open_engine(config, base, None, 1, 4096, 256) as opened:
        expected = BatchEngine(opened.core, None).score_choices(prompts, [choices] * len(prompts), lambda _done: None)
    for row, shares in zip(found, expected, strict=True):
        best = max(shares)
        assert [row[f"fpb_p_{choice}"] for choice in plan.form.choices] == pytest.approx(shares, abs=2e-6)
        assert row["fpb_label"] == plan.form.choices[shares.index(best)]
        assert row["fpb_probability"] == pytest.approx(best, abs=2e-6)
        assert row["fpb_abstained"] == (best < 0.4)
        assert row["fpb_reason"] is None


def test_parts_are_equal_byte_for_byte_in_any_order(plan_of, tmp_path):
    plan = plan_of()
    assert len(plan.table.parts) == 3
    files = []
    for name, order in (("one", [0, 1, 2]), ("other", [2, 0, 1])):
        score(plan, tmp_path / name, order)
        files.append([ScoreFolder(tmp_path / name).path(number).read_bytes() for number in range(3)])
    assert files[0] == files[1]


def note_batches(scorer):
    """Return a list that gets the prompts of each part and the tokens of its micro-batches."""
    answer, executor, noted = scorer._answer, scorer._engine.core.executor, []
    start = executor.start

    def begin(asked):
        noted.append(([row.prompt_ids for row in asked], []))
        return answer(asked)

    def note(batch):
        noted[-1][1].append((batch.input_ids, [count for *_, count in batch.copies]))
        start(batch)

    scorer._answer, executor.start = begin, note
    return noted


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_parts_in_progress_at_once_give_the_bytes_of_one_after_the_other(plan_of, tmp_path, data):
    """Any size of the parts, any number of threads and any order; some parts come twice, as after a restart.

    In bfloat16 a probability may depend on what else is in its micro-batch, so those are equal too.
    """
    count, part_rows = data.draw(st.integers(1, len(TEXTS))), data.draw(st.integers(1, 6))
    plan = plan_of("model.compute_dtype=bfloat16", texts=TEXTS[:count], part_rows=part_rows)
    numbers = range(len(plan.table.parts))
    order = [*data.draw(st.permutations(numbers)), *data.draw(st.lists(st.sampled_from(numbers), max_size=3))]
    base, files, batches = read_base_files(plan.config.model), [], []
    for name, own, num_threads in (("one", numbers, 1), ("many", order, data.draw(st.integers(2, 5)))):
        folder = ScoreFolder(tmp_path / name)
        shutil.rmtree(folder.parts, ignore_errors=True)
        folder.parts.mkdir()
        scorer = Scorer(plan, folder.out, plan_cache(plan, base), base)
        noted = note_batches(scorer)
        with ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(scorer.score, [plan.table.parts[number] for number in own]))
        scorer.close()
        assert sorted(path.name for path in folder.parts.iterdir()) == [folder.path(number).name for number in numbers]
        files.append([folder.path(number).read_bytes() for number in numbers])
        batches.append(noted)
    assert files[0] == files[1]
    assert all(part in batches[0] for part in batches[1])


def test_a_fault_in_one_part_is_raised_and_the_others_are_sealed(plan_of, tmp_path, monkeypatch):
    plan, base = plan_of(), read_base_files(plan_of().config.model)
    folder = ScoreFolder(tmp_path / "out.csv")
    folder.parts.mkdir()
    scorer = Scorer(plan, folder.out, plan_cache(plan, base), base)
    answer = scorer._answer

    def fail_once(asked):
        if len(asked) == plan.table.parts[2].num_rows:
            raise ModelError("the model computed NaN")
        return answer(asked)

    monkeypatch.setattr(scorer, "_answer", fail_once)
    with ThreadPoolExecutor(3) as pool:
        results = [pool.submit(scorer.score, part) for part in plan.table.parts]
    assert [result.exception() is None for result in results] == [True, True, False]
    with pytest.raises(ModelError, match="computed NaN"):
        results[2].result()
    assert [folder.is_sealed(number) for number in range(3)] == [True, True, False]
    scorer.close()


def test_rows_that_cannot_be_scored_have_a_reason(plan_of, tmp_path):
    plan = plan_of(texts=["Profit rose", "  ", "word " * 400, "Profit fell"])
    found = score(plan, tmp_path / "out.csv")
    assert [row["fpb_label"] is None for row in found] == [False, True, True, False]
    assert found[1]["fpb_reason"] == "no text in body"
    assert found[2]["fpb_reason"].startswith("too long: ")
    assert found[2]["fpb_reason"].endswith("for the answer, the model takes 256")


def test_text_is_generated_and_quoted(plan_of, tmp_path):
    plan = plan_of("eval.max_new_tokens=4", texts=["Profit rose", "Profit fell"], task=None)
    assert list(plan.columns) == ["finlora_answer", "finlora_reason"]
    found = score(plan, tmp_path / "out.csv")
    assert all(isinstance(row["finlora_answer"], str) for row in found)
    assert "the text alone" in describe_plan(plan)


def test_an_adapter_is_bound_by_the_hash_that_card_server_and_approval_show(make_config, tmp_path):
    config = make_config("model.max_seq_len=256")
    base, table = read_base_files(config.model), open_table(write_table(tmp_path), 8)
    loaded, folder = load_base(config.model, 16, torch.device("cpu"), 0), tmp_path / "adapter"
    size = save_adapter(attach_lora(loaded.model, config.lora, config.model.base, 0), folder)
    facts = (config.lora, config.model.template, {"fpb": "x"}, 5, size, {}, None)
    write_contract(folder, make_contract(loaded, config.model.base, *facts))
    plan = make_plan(config, base, folder, table, task="fpb", text="body", about=None, threshold=None)
    assert plan.binding["adapter"] == hash_weights_and_settings(folder)


def test_task_of_a_task_file_is_scored_in_another_process(make_config, tmp_path):
    prepare_letters(tmp_path)
    config = make_config("model.max_seq_len=256", f"data.dir={tmp_path / 'data'}")
    base, table = read_base_files(config.model), open_table(write_table(tmp_path), 8)
    plan = make_plan(config, base, None, table, task="letters", text="body", about=None, threshold=None)
    found = score(pickle.loads(cloudpickle.dumps(plan)), tmp_path / "out.csv")
    labels = list(plan.form.choices)
    assert [*plan.columns] == [
        f"letters_{key}" for key in ("label", "probability", *(f"p_{x}" for x in labels), "reason")
    ]
    assert {row["letters_label"] for row in found} <= set(labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "fbp"}, "'fbp' is not a task: did you mean fpb"),
        ({"text": "txt"}, "found no column 'txt': expected one of id, body"),
        ({"text": None}, "found no column 'text': name the column that is asked about with --text: id, body"),
        ({"task": "ner"}, "ner asks about one entity of each text: name the column that holds it with --about"),
        ({"about": "id"}, "fpb asks nothing beside the text: leave --about out"),
        ({"task": "ner", "about": "who"}, "found no column 'who'"),
        ({"threshold": 1.5}, "found --threshold 1.5: expected a probability between 0 and 1"),
        ({"task": None, "threshold": 0.5}, "--threshold is for labels, and a plain prompt is answered in free text"),
        ({"task": "synthetic_mix"}, "cannot be asked|is not a task"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(plan_of, options, message):
    with pytest.raises(Exception, match=message) as found:
        plan_of(**options)
    assert found.value.exit_code in (2, 3)


def test_added_column_must_not_exist_in_the_table(make_config, tmp_path):
    config = make_config()
    (tmp_path / "in.csv").write_text("text,fpb_label\na,b\n")
    table = open_table(tmp_path / "in.csv", 8)
    with pytest.raises(ConfigError, match="has a column 'fpb_label' already"):
        make_plan(config, read_base_files(config.model), None, table, task="fpb", text=None, about=None, threshold=None)
