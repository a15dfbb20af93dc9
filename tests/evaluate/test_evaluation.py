"""Evaluation from files to Result on the tiny base, by label scoring and by generation, and what is refused before it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from emulated_flash import emulate_flash
from letters import prepare_letters

from finlora.config import LoraConfig
from finlora.configfile import config_to_tree, save_config
from finlora.data.encode import encode_examples
from finlora.data.sets.catalog import make_question
from finlora.data.sets.prepared import read_prepared
from finlora.errors import AdapterError, DatasetError, ModelError, ResourceError
from finlora.evaluate.evaluation import (
    answer_examples,
    check_evaluation,
    count_gpu_hours,
    encode_split,
    run_evaluation,
)
from finlora.inference.ask import list_own_forms
from finlora.inference.batch import BatchEngine
from finlora.model.base import load_base
from finlora.model.base_files import read_base_files
from finlora.model.contract import CONTRACT_FILE, TASKS_FILE, make_contract, read_contract, write_contract, write_tasks
from finlora.model.lora import attach_lora, save_adapter, trainable_parameters
from finlora.model.merge import export_merged
from finlora.model.source import find_source, fingerprint_weights
from finlora.model.tokenizer import load_tokenizer
from finlora.stage.decode_graphs import StageGraphs

CPU = torch.device("cpu")
ROUNDING = 1e-6  # of float32 sums, which one thread adds in another order than two on processors without AVX512


def quiet(*_progress):
    """Discard progress."""


@pytest.fixture
def adapter(make_config, tmp_path):
    """Folder with an adapter that changes the answers, and its contract."""
    config = make_config()
    base = load_base(config.model, 16, CPU, 0)
    lora = LoraConfig()
    model = attach_lora(base.model, lora, config.model.base, 1)
    torch.manual_seed(4)
    for parameter in trainable_parameters(model).values():
        parameter.data = torch.randn_like(parameter) * 2
    size = save_adapter(model, tmp_path / "adapter")
    contract = make_contract(base, config.model.base, lora, "raw", {"synthetic_sentiment": "x"}, 5, size, {})
    write_contract(tmp_path / "adapter", dataclasses.replace(contract, bits=4))
    return tmp_path / "adapter"


def test_base_result_holds_scores_counts_and_origin(make_config, prepared_synthetic):
    config = make_config("data.max_test_examples=30", "eval.batch_size=8")
    seen = []
    (result,) = run_evaluation(config, None, lambda *progress: seen.append(progress))
    split = read_prepared(prepared_synthetic, "synthetic_sentiment", "test")
    assert (result.kind, result.task, result.variant, result.adapter) == (
        "evaluation",
        "synthetic_sentiment",
        "base",
        None,
    )
    assert (result.method, result.num_examples, result.bits) == ("labels", 30, 16)
    assert {"accuracy", "accuracy_low", "accuracy_high", "strict_accuracy", "weighted_f1"} <= result.metrics.keys()
    assert result.metrics["accuracy_low"] <= result.metrics["accuracy"] <= result.metrics["accuracy_high"]
    assert result.metrics["unparsable"] == 0
    assert sum(count for row in result.counts.values() for count in row.values()) == 30
    assert result.data_hash == split.hash
    assert result.config == config_to_tree(config)
    assert result.seconds_per_example == pytest.approx(result.wall_seconds / 30)
    assert result.gpu_hours is None
    assert result.adapter_mib is None
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    assert seen[-1] == ("synthetic_sentiment", 30, 30)


def test_result_names_the_run_of_its_adapter(make_config, adapter, tmp_path):
    config = make_config("data.max_test_examples=3")
    (base,) = run_evaluation(config, None, quiet)
    assert (base.run, base.adapter, base.adapter_hash) == (None, None, None)
    assert base.base_hash == fingerprint_weights(find_source(config.model))
    assert base.waited_seconds == 0.0
    (result,) = run_evaluation(config, adapter, quiet)
    digest = hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (result.adapter, result.adapter_hash, result.base_hash) == (str(adapter), digest, base.base_hash)
    assert result.run == tmp_path.name  # the folder's name, since no config is beside it
    # A copy belongs to the run whose config is beside its weights.
    copy = tmp_path / "desk"
    shutil.copytree(adapter, copy)
    save_config(dataclasses.replace(config, name="my run #2"), copy / "config.yaml")
    (again,) = run_evaluation(config, copy, quiet)
    assert (again.run, again.adapter_hash) == ("my run #2", digest)


def test_only_a_limited_evaluation_is_partial(make_config, prepared_synthetic):
    num_examples = len(read_prepared(prepared_synthetic, "synthetic_sentiment", "test").examples)
    (limited,) = run_evaluation(make_config("data.max_test_examples=3"), None, quiet)
    (whole,) = run_evaluation(make_config("eval.batch_size=64"), None, quiet)
    assert (limited.num_examples, limited.is_partial) == (3, True)
    assert (whole.num_examples, whole.is_partial) == (num_examples, False)


def test_skipped_examples_make_an_evaluation_partial(make_config, prepared_synthetic):
    config = make_config("data.max_test_examples=40")
    examples = read_prepared(prepared_synthetic, "synthetic_sentiment", "test").examples[:40]
    tokenizer = load_base(config.model, 16, CPU, 0).tokenizer
    encoded, _ = encode_examples(examples, tokenizer, template="raw", max_seq_len=4096, too_long="error")
    limit = sorted(item.num_tokens for item in encoded)[20]
    (result,) = run_evaluation(
        make_config("data.max_test_examples=40", f"model.max_seq_len={limit}", "data.too_long=skip"), None, quiet
    )
    assert result.num_examples == sum(item.num_tokens <= limit for item in encoded) < 40
    assert result.is_partial is True


def test_free_generation_reports_its_method_and_answers(make_config):
    (result,) = run_evaluation(
        make_config("data.max_test_examples=6", "eval.method=generate", "eval.max_new_tokens=4"), None, quiet
    )
    assert (result.method, result.num_examples) == ("generate", 6)
    assert result.metrics["unparsable"] >= 0


def test_free_text_is_generated_with_every_method(make_config):
    results = run_evaluation(
        make_config(
            "data.tasks=[synthetic_sentiment, synthetic_xbrl]", "data.max_test_examples=4", "eval.max_new_tokens=3"
        ),
        None,
        quiet,
    )
    assert [(result.task, result.method) for result in results] == [
        ("synthetic_sentiment", "labels"),
        ("synthetic_xbrl", "generate"),
    ]


def test_free_text_needs_room_for_its_answer_under_label_scoring_too(make_config, prepared_synthetic):
    """A free-text question that fits only without its answer is too long, for every eval.method."""
    config = make_config("data.tasks=[synthetic_xbrl]")
    examples = read_prepared(prepared_synthetic, "synthetic_xbrl", "test").examples[:4]
    tokenizer = load_base(config.model, 16, CPU, 0).tokenizer
    encoded, _ = encode_examples(examples, tokenizer, template="raw", max_seq_len=4096, too_long="error")
    limit = max(item.num_tokens for item in encoded)
    config = make_config(
        "data.tasks=[synthetic_xbrl]",
        "data.max_test_examples=4",
        f"model.max_seq_len={limit}",
        "eval.max_new_tokens=200",
    )
    with pytest.raises(DatasetError, match=r"are longer than model.max_seq_len"):
        run_evaluation(config, None, quiet)


def test_answers_belong_to_their_examples_and_progress_counts_both_kinds(make_config):
    """The fake engine answers with the prompt's length, and prefers each second choice."""
    task = ["data.tasks=[synthetic_sentiment, synthetic_xbrl]", "data.max_test_examples=4"]
    config = make_config(*task)
    tokenizer = load_tokenizer(find_source(config.model).tokenizer_path)

    class Lengths:
        def score_choices(self, prompts, choices, on_done):
            on_done(len(prompts))
            return [[0.1, 0.8, *[0.0] * (len(own) - 2)] for own in choices]

        def generate(self, prompts, max_new_tokens, on_done):
            on_done(1)
            return [str(len(prompt)) for prompt in prompts]

    for name, method in (("synthetic_sentiment", "labels"), ("synthetic_xbrl", "generate")):
        split = read_prepared(Path(config.data.dir), name, "test")
        work = encode_split(config, tokenizer, split, name)
        seen = []
        answers, used, confidences, _ = answer_examples(Lengths(), work, config, seen.append)
        assert used == method
        if method == "labels":
            assert answers == [example.choices[1] for example in work.examples]
            assert confidences == dict.fromkeys(range(len(answers)), 0.8)
        else:
            assert answers == [str(len(item.prompt_ids)) for item in work.encoded]
            assert confidences == {}
            assert seen == [1]


def test_adapter_is_scored_under_its_own_name(make_config, adapter, monkeypatch):
    scores = []
    score_choices = BatchEngine.score_choices

    def record(engine, prompts, choices, on_done):
        scores.append(score_choices(engine, prompts, choices, on_done))
        return scores[-1]

    monkeypatch.setattr(BatchEngine, "score_choices", record)
    config = make_config("data.max_test_examples=5")
    run_evaluation(config, None, quiet)
    (result,) = run_evaluation(config, adapter, quiet)
    assert (result.variant, result.adapter) == ("4bit-r4", str(adapter))
    assert result.adapter_mib == pytest.approx((adapter / "adapter_model.safetensors").stat().st_size / 2**20, abs=1e-3)
    of_base, of_adapter = (torch.tensor(rows) for rows in scores)
    assert (of_base - of_adapter).abs().max() > 0.01
    chosen = of_adapter.max(dim=1).values
    assert sum(each["count"] * each["confidence"] for each in result.calibration) == pytest.approx(float(chosen.sum()))
    assert 0 <= result.metrics["calibration_error"] <= 1


@pytest.mark.ray
def test_stages_change_no_answer_and_report_their_load(make_config, adapter, ray_instance):
    limits = ["data.max_test_examples=12", "eval.num_gpus=1"]
    readings = []
    (alone,) = run_evaluation(make_config(*limits), adapter, quiet)
    (spread,) = run_evaluation(make_config(*limits, "eval.num_stages=2"), adapter, quiet, readings.append)
    assert (spread.metrics, spread.counts) == (pytest.approx(alone.metrics, rel=ROUNDING), alone.counts)
    assert spread.peak_memory_gib > 0
    (reading,) = readings
    assert len(reading.busy) == 2
    assert re.search(r"2 stages busy \d+% / \d+%, bubble [\d.]+% where equal stages have [\d.]+%", reading.describe())


@pytest.mark.ray
def test_evaluation_continues_after_a_stage_crash(make_config, adapter, ray_instance, monkeypatch, caplog):
    import ray

    from finlora.pipeline.pipeline import Pipeline

    connect, pipelines, progress = Pipeline._connect, [], []

    def record(pipeline):
        pipelines.append(pipeline)
        connect(pipeline)

    def kill_at_first(*news):
        if len(progress) == 0:
            pids = ray.get([actor.__ray_call__.remote(lambda _stage: os.getpid()) for actor in pipelines[0].actors])
            os.kill(pids[1], signal.SIGKILL)
        progress.append(news)

    monkeypatch.setattr(Pipeline, "_connect", record)
    limits = ["data.max_test_examples=40", "eval.num_gpus=1", "eval.batch_size=2"]
    (alone,) = run_evaluation(make_config(*limits), adapter, quiet)
    (spread,) = run_evaluation(make_config(*limits, "eval.num_stages=2"), adapter, kill_at_first)
    assert (spread.metrics, spread.counts) == (pytest.approx(alone.metrics, rel=ROUNDING), alone.counts)
    assert len(pipelines) == 2  # started, and joined again
    assert re.search(
        r"a stage of the model was lost \(.*died.*\): ask again; .*it submits the unanswered prompts again", caplog.text
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_bits_of_the_evaluation_override_those_of_training(make_config, adapter, bits):
    (result,) = run_evaluation(make_config("data.max_test_examples=4", f"eval.bits={bits}"), adapter, quiet)
    assert result.bits == bits


def check(config, adapter):
    return check_evaluation(config, read_base_files(config.model), adapter)


def test_plan_names_subject_bits_and_examples(make_config, adapter, prepared_synthetic):
    count = len(read_prepared(prepared_synthetic, "synthetic_sentiment", "test").examples)
    text = check(make_config("data.max_test_examples=7", "eval.bits=8"), None)
    assert text.startswith("Evaluating the base model on ")
    assert f"at 8 bit (cpu, float32): test examples synthetic_sentiment {count}, the first 7 of each" in text
    assert "Evaluating adapter 4bit-r4 of" in check(make_config(), adapter)


def test_missing_split_is_refused_before_the_model_loads(make_config, monkeypatch):
    monkeypatch.setattr("finlora.evaluate.evaluation.open_engine", None)
    for run in (check, lambda config, chosen: run_evaluation(config, chosen, quiet)):
        with pytest.raises(DatasetError, match=r"fpb/test.parquet: not found. Run `finlora prepare fpb"):
            run(make_config("data.tasks=[fpb]"), None)


def test_missing_or_unfinished_adapter_is_refused_with_a_message(make_config, adapter, tmp_path):
    with pytest.raises(AdapterError, match=r"absent does not exist: run `finlora train`"):
        check(make_config(), tmp_path / "absent")
    (adapter / CONTRACT_FILE).unlink()
    (adapter.parent / "config.yaml").touch()  # of the unfinished run
    with pytest.raises(AdapterError, match=r"so its training did not finish"):
        run_evaluation(make_config(), adapter, quiet)


def test_adapter_of_another_template_is_refused_with_a_message(make_config, dated_base, adapter):
    with pytest.raises(AdapterError, match=r"template is chat, trained with raw"):
        run_evaluation(make_config(f"model.base={dated_base}", "model.template=chat"), adapter, quiet)


def test_missing_base_is_refused_with_a_message(make_config, tmp_path):
    with pytest.raises(ModelError, match=r"is neither a folder here nor a hub id"):
        check(make_config(f"model.base={tmp_path / 'absent'}"), None)


def test_absent_gpu_is_refused_with_a_message(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=r"torch sees none here"):
        run_evaluation(make_config("eval.device=cuda"), None, quiet)


def test_text_of_a_whole_split_is_the_same_on_the_gpu_path(make_config, adapter, monkeypatch):
    """`finlora evaluate` of XBRL at the default batch size, by padded passes and emulated FlashAttention."""
    config = make_config("data.tasks=[synthetic_xbrl]", "data.max_test_examples=150", "eval.max_new_tokens=6")
    (plain,) = run_evaluation(config, adapter, quiet)
    forms, lay_out = set(), StageGraphs._lay_out
    emulate_flash(monkeypatch)
    monkeypatch.setattr(
        StageGraphs,
        "_lay_out",
        lambda self, batch, taken, *rest: forms.add(taken.form) or lay_out(self, batch, taken, *rest),
    )
    (padded,) = run_evaluation(config, adapter, quiet)
    assert plain.method == padded.method == "generate"
    assert padded.metrics == pytest.approx(plain.metrics)
    assert padded.counts == plain.counts
    assert any(form.num_segments == 128 for form in forms)


@pytest.mark.parametrize(
    ("device", "num_stages", "num_gpus", "hours"),
    [("cpu", 4, 1.0, None), ("cuda", 1, 1.0, 2.0), ("cuda", 4, 1.0, 8.0), ("cuda", 4, 0.25, 2.0)],
)
def test_gpu_hours_count_shares_of_gpus(make_config, device, num_stages, num_gpus, hours):
    config = make_config(f"eval.device={device}", f"eval.num_stages={num_stages}", f"eval.num_gpus={num_gpus}")
    assert count_gpu_hours(config, 7200.0) == hours


@pytest.fixture
def letters_adapter(adapter, tmp_path):
    """The adapter with a task file's task in its contract."""
    data = prepare_letters(tmp_path, columns={"segments": ["desk"]})
    split = read_prepared(data, "letters", "train")
    write_tasks(adapter, {"letters": split.card})
    contract = dataclasses.replace(
        read_contract(adapter), tasks={"letters": split.card_hash}, data_hashes={"letters": split.hash}
    )
    write_contract(adapter, contract)
    return adapter


def test_task_of_a_task_file_is_scored_by_its_segments(make_config, letters_adapter, tmp_path):
    config = make_config("data.tasks=[letters]", f"data.dir={tmp_path / 'data'}")
    (result,) = run_evaluation(config, letters_adapter, quiet)
    assert (result.task, result.num_examples, set(result.counts)) == ("letters", 8, {"bad", "good"})
    desks = result.segments["desk"]
    assert sum(scores["count"] for scores in desks.values()) == 8
    right = sum(scores["count"] * scores["accuracy"] for scores in desks.values())
    assert right == pytest.approx(8 * result.metrics["accuracy"])


def test_changed_prompt_is_another_task(make_config, letters_adapter, tmp_path):
    prepare_letters(tmp_path, prompt={"instruction": "What is the mood?"})
    config = make_config("data.tasks=[letters]", f"data.dir={tmp_path / 'data'}")
    words = (
        r"trained with task hash [0-9a-f]{12}, the prepared task letters has [0-9a-f]{12}: its kind, labels or prompt"
    )
    with pytest.raises(AdapterError, match=words):
        check_evaluation(config, read_base_files(config.model), letters_adapter)
    with pytest.raises(AdapterError, match=words):
        run_evaluation(config, letters_adapter, quiet)


def test_adapter_brings_its_task_and_a_changed_one_is_refused(make_config, letters_adapter, tmp_path):
    base = read_base_files(make_config().model)
    own = list_own_forms("letters", letters_adapter, tmp_path / "nothing", base)
    question = make_question("letters", "Dear bank", None, own)
    assert question.choices == ("bad", "good")
    assert question.prompt.startswith("Instruction: What is the tone? Please choose an answer from {bad/good}.")
    assert list_own_forms("fpb", letters_adapter, tmp_path, base) == {}
    (letters_adapter / TASKS_FILE).write_text((letters_adapter / TASKS_FILE).read_text().replace("tone", "mood"))
    with pytest.raises(AdapterError, match="holds other tasks than the adapter was trained on"):
        list_own_forms("letters", letters_adapter, tmp_path, base)


def test_merged_model_brings_the_task_of_its_adapter(make_config, letters_adapter, tmp_path):
    merged, model = tmp_path / "merged", make_config().model
    export_merged(model, letters_adapter, merged, torch.device("cpu"), allow_other_bits=True)
    files = read_base_files(dataclasses.replace(model, base=str(merged)))
    own = list_own_forms("letters", None, tmp_path / "nothing", files)
    assert make_question("letters", "Dear bank", None, own).choices == ("bad", "good")
    (merged / TASKS_FILE).write_text((merged / TASKS_FILE).read_text().replace("tone", "mood"))
    with pytest.raises(AdapterError, match="holds other tasks than the adapter was trained on"):
        list_own_forms("letters", None, tmp_path, read_base_files(dataclasses.replace(model, base=str(merged))))


def test_prepared_task_is_asked_of_the_base(make_config, tmp_path):
    own = list_own_forms("letters", None, prepare_letters(tmp_path), read_base_files(make_config().model))
    assert make_question("letters", "Dear bank", None, own).choices == ("bad", "good")
