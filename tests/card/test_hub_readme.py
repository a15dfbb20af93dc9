"""README of an adapter: the hub's library reads it, its code loads the adapter with PEFT, and scores come in later."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import re

import pytest
import torch
import yaml
from carded import make_run
from huggingface_hub import ModelCard
from made_results import make_evaluation

from finlora.card.hub_readme import BEGIN, END, README, refresh_scores, update_scores, write_readme
from finlora.config import LoraConfig
from finlora.configfile import config_from_tree, save_config
from finlora.data.sets.catalog import TASKS
from finlora.durable import hash_file
from finlora.model.adapter_files import hash_weights_and_settings
from finlora.model.base import load_base
from finlora.model.contract import make_contract, read_contract, write_contract
from finlora.model.lora import attach_lora, save_adapter, trainable_parameters
from finlora.results import append_result

HUB = "meta-llama/Llama-3.1-8B-Instruct"
CPU = torch.device("cpu")


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """An adapter as a training writes it, on the tiny base, for the task fpb."""
    config = config_from_tree(
        {"name": "tone", "model": {"base": str(tiny_base), "bits": 16, "compute_dtype": "float32"}}
    )
    base = load_base(config.model, 16, CPU, 0)
    net = attach_lora(base.model, LoraConfig(), config.model.base, 1)
    torch.manual_seed(4)
    for parameter in trainable_parameters(net).values():
        parameter.data = torch.randn_like(parameter)
    folder = tmp_path / "adapter"
    size = save_adapter(net, folder)
    save_config(config, folder / "config.yaml")
    contract = make_contract(
        base, config.model.base, LoraConfig(), "raw", {"fpb": "d" * 64}, 5, size, {"loss_last": 0.5}
    )
    write_readme(folder, config, contract, {"fpb": "CC BY-NC-SA 3.0"}, {})
    write_contract(folder, contract)
    return folder


def load_card(folder):
    return ModelCard.load(folder / README)


def test_hub_library_reads_the_front_matter(adapter, tiny_base):
    data = load_card(adapter).data
    assert (data.library_name, data.license, data.license_name) == ("peft", "other", "as-base-and-data")
    assert (data.datasets, data.metrics) == ([TASKS["fpb"].hub_id], ["accuracy", "f1"])
    assert {"lora", "finlora"} <= set(data.tags)
    assert data.base_model is None  # a local folder has no hub id, and none is guessed
    text = (adapter / README).read_text()
    assert "# base_model: OWNER/NAME" in text
    assert str(tiny_base.parent) not in text  # no path of this machine


def test_base_of_the_hub_is_named_with_its_commit(adapter):
    contract = dataclasses.replace(
        read_contract(adapter), base=HUB, revision="a" * 40, template="chat", template_date="2024-07-26"
    )
    config = config_from_tree({"name": "tone", "model": {"base": HUB}})
    write_readme(adapter, config, contract, {"fpb": "x"}, {})
    data = load_card(adapter).data
    assert data.base_model == HUB
    assert f"base_model:adapter:{HUB}" in data.tags
    text = (adapter / README).read_text()
    assert f'from_pretrained("{HUB}", revision="{"a" * 40}")' in text
    assert 'date_string="26 Jul 2024"' in text


def test_shown_code_loads_the_adapter_with_plain_peft(adapter, tiny_base, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / README).read_text(), flags=re.DOTALL)
    monkeypatch.chdir(adapter)
    shown = io.StringIO()
    values = {}
    with contextlib.redirect_stdout(shown):
        exec(code.replace('"BASE"', repr(str(tiny_base))), values)
    assert "positive" in values["prompt"]
    assert values["ids"][0] == values["tokenizer"].bos_token_id
    assert values["output"].shape[1] > len(values["ids"])
    assert type(values["model"]).__name__.startswith("Peft")


def test_scores_come_between_the_marks_and_change_no_hash(adapter):
    weights = hash_file(adapter / "adapter_model.safetensors")
    before = hash_weights_and_settings(adapter), read_contract(adapter)
    path = adapter / README
    path.write_text(
        path.read_text().replace("## Scores", "My own words.\n\n## Scores").replace("tags:", "language: en\ntags:")
    )
    results = [
        make_evaluation(
            0.863, adapter_hash=weights, counts={"a": {"a": 3}, "b": {"a": 1}}, num_examples=4, is_partial=True
        ),
        make_evaluation(0.5, adapter_hash="another"),
        make_evaluation(0.4, variant="base"),
    ]
    assert update_scores(adapter, results, weights)
    once = path.read_text()
    assert "My own words." in once
    assert "| fpb, 8 bit, by labels | 4\\* | 86.3 (84.3–87.3) |" in once.partition(BEGIN)[2].partition(END)[0]
    data = load_card(adapter).data
    assert data.language == "en"
    scored = {(each.metric_type, each.metric_value) for each in data.eval_results}
    assert scored == {("accuracy", 0.863), ("f1", 0.863)}
    assert {each.dataset_name for each in data.eval_results} == {"fpb, 8 bit, by labels, 4 examples alone"}
    assert update_scores(adapter, results, weights)
    assert path.read_text() == once  # the same scores again change nothing
    assert (hash_weights_and_settings(adapter), read_contract(adapter)) == before
    read_contract(adapter).check_files(adapter)


def test_scores_of_another_folder_stay_until_the_same_is_measured_again(adapter):
    weights = hash_file(adapter / "adapter_model.safetensors")

    def score(value, **changes):
        assert update_scores(adapter, [make_evaluation(value, adapter_hash=weights, **changes)], weights)
        block = (adapter / README).read_text().partition(BEGIN)[2].partition(END)[0]
        rows = [line.split(" | ") for line in block.splitlines()[3:] if line.startswith("|")]
        in_table = [(row[0].removeprefix("| "), row[2].partition(" ")[0]) for row in rows]
        entries = [each for each in load_card(adapter).data.eval_results if each.metric_type == "accuracy"]
        in_front = [(each.dataset_name.partition(", 4 ex")[0], f"{100 * each.metric_value:.1f}") for each in entries]
        assert sorted(in_table) == sorted(in_front)
        return in_table

    labels, texts = "fpb, 8 bit, by labels", "fpb, 8 bit, by generate"
    part = {"num_examples": 4, "is_partial": True}
    assert score(0.7, **part) == [(labels, "70.0")]
    assert score(0.6, method="generate") == [(labels, "70.0"), (texts, "60.0")]
    assert score(0.8) == [(texts, "60.0"), (labels, "80.0")]  # the whole split replaces its part
    assert score(0.75, **part) == [(texts, "60.0"), (labels, "80.0"), (labels, "75.0")]
    assert score(0.65, method="generate") == [(labels, "80.0"), (labels, "75.0"), (texts, "65.0")]


def test_front_matter_in_another_form_is_written_anew(adapter):
    weights = hash_file(adapter / "adapter_model.safetensors")
    path = adapter / README
    path.write_text(path.read_text().replace("tags:", "model-index:\n- mine\ntags:"))
    assert update_scores(adapter, [make_evaluation(0.7, adapter_hash=weights)], weights)
    assert {each.metric_value for each in load_card(adapter).data.eval_results} == {0.7}


def test_folder_that_cannot_be_written_keeps_its_scores_and_says_so(adapter, monkeypatch):
    results = adapter.parent / "results.jsonl"
    weights = hash_file(adapter / "adapter_model.safetensors")
    append_result(results, make_evaluation(adapter_hash=weights))
    before = (adapter / README).read_text()

    def refuse(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("finlora.card.hub_readme.write_whole", refuse)
        assert refresh_scores(adapter, results).endswith(
            "keeps its old scores: it cannot be written (Read-only file system)."
        )
    assert (adapter / README).read_text() == before
    assert refresh_scores(adapter, results) == f"Scores written to {adapter / README}"


@pytest.mark.parametrize("text", ["My own card.\n", f"---\nlicense: mit\n---\n{BEGIN}\n", ""])
def test_readme_without_the_marks_is_left_alone(tmp_path, text):
    (tmp_path / README).write_text(text)
    assert not update_scores(tmp_path, [make_evaluation(adapter_hash="w")], "w")
    assert (tmp_path / README).read_text() == text
    (tmp_path / README).unlink()
    assert not update_scores(tmp_path, [make_evaluation(adapter_hash="w")], "w")
    assert not (tmp_path / README).exists()


def test_own_task_shows_its_own_prompt(tmp_path):
    adapter = make_run(tmp_path)
    contract = read_contract(adapter)
    config = config_from_tree({"name": "tone"})
    trees = yaml.safe_load((adapter / "tasks.yaml").read_text())
    write_readme(adapter, config, contract, {"letters": "internal"}, {"letters": yaml.safe_dump(trees["letters"])})
    text = (adapter / README).read_text()
    assert "What is the tone?" in text
    assert "| data letters | internal |" in text
    assert "--task letters" in text
