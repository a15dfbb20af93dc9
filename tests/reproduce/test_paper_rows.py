"""The plan has every row of the paper's tables, each step after those that it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from finlora.data.sets.catalog import PUBLISHED, TASKS
from finlora.errors import ConfigError
from finlora.report.comparable import explain_missing, find_ours
from finlora.report.paper import PAPER
from finlora.reproduce.paper_rows import make_plan
from finlora.results import Result

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def results_of(step):
    """Return the results that a step would have on a GPU."""
    config = step.config
    variant = f"{config.model.bits}bit-r{config.lora.rank}" if step.kind == "train" or step.of_adapter else "base"
    shared = {
        "base": config.model.base,
        "variant": variant,
        "config": {"eval": {"batch_size": config.eval.batch_size}},
        "gpu_hours": 1.0,
        "peak_memory_gib": 1.0,
    }
    if step.kind == "train":
        return [
            Result(kind="training", task="+".join(config.data.tasks), bits=config.model.bits, adapter_mib=4.5, **shared)
        ]
    metrics = {"accuracy": 0.5}
    hashes = {
        task: form.test_hash
        for task, forms in PUBLISHED.items()
        for form in forms
        if form.test_hash and form.variant != "corrected"
    }
    return [
        Result(
            kind="evaluation",
            task=task,
            bits=config.eval.bits,
            seconds_per_example=0.1,
            metrics=metrics,
            data_hash=hashes.get(task),
            **shared,
        )
        for task in config.data.tasks
    ]


def test_plan_covers_every_number_of_the_paper(tmp_path):
    results = [result for step in make_plan(CONFIGS, tmp_path, []) for result in results_of(step)]
    for value in PAPER:
        assert find_ours(value, results) is not None, explain_missing(value, results)


def test_step_names_are_unique_and_trainings_come_first(tmp_path):
    steps = make_plan(CONFIGS, tmp_path, [])
    names = [step.name for step in steps]
    assert len(set(names)) == len(names) == 78
    for step in steps:
        if step.kind == "evaluate" and step.of_adapter:
            assert names.index(f"{step.config.name}-train") < names.index(step.name)
    assert [step.kind for step in steps].count("train") == 28
    assert "-70b-" not in "".join(names[: names.index("llama-70b-memory-16bit-evaluate")])


def test_runs_of_base_and_adapter_do_not_share_a_folder(tmp_path):
    steps = make_plan(CONFIGS, tmp_path, [])
    base = next(step for step in steps if step.name == "llama-8b-base-fpb-evaluate")
    adapter = next(step for step in steps if step.name == "llama-8b-4bit-r4-fpb-evaluate")
    assert base.adapter is None
    assert adapter.adapter == tmp_path / "runs" / "llama-8b-4bit-r4-fpb" / "adapter"
    memory = next(step for step in steps if step.name == "llama-8b-memory-4bit-evaluate").config
    assert (memory.eval.bits, memory.eval.batch_size, memory.data.max_test_examples) == (4, 1, 8)


@pytest.mark.parametrize(
    ("row", "tasks"),
    [
        ("sentiment", ("fpb", "fiqa_paper", "tfns", "nwgi")),
        ("classification", ("fpb", "fiqa_paper", "tfns", "nwgi", "ner", "headline")),
        ("formulas", ("synthetic_formulas",)),
    ],
)
def test_rows_beyond_the_paper_train_and_score_their_tasks(tmp_path, row, tasks):
    for family in ("llama-8b-4bit-r4", "llama-8b-8bit-r8"):
        train, evaluate = make_plan(CONFIGS, tmp_path, [], f"{family}-{row}-*")
        assert (train.kind, evaluate.kind) == ("train", "evaluate")
        assert train.config.data.tasks == evaluate.config.data.tasks == tasks
        assert train.adapter == evaluate.adapter == tmp_path / "runs" / f"{family}-{row}" / "adapter"
        assert set(tasks) <= set(TASKS)


def test_base_is_scored_on_formulas_too(tmp_path):
    assert [step.config.data.tasks for step in make_plan(CONFIGS, tmp_path, [], "*-base-formulas-*")] == [
        ("synthetic_formulas",),
        ("synthetic_formulas",),
    ]


def test_each_size_has_its_base_and_overrides_apply_to_all(tmp_path):
    plan = make_plan(CONFIGS, tmp_path, ["train.num_workers=1"], bases={"8b": "/mirror/small"})
    assert {step.config.train.num_workers for step in plan} == {1}
    bases = {step.name.split("-")[1]: step.config.model.base for step in plan}
    assert bases == {"8b": "/mirror/small", "70b": "meta-llama/Llama-3.1-70B-Instruct"}


def test_key_changes_with_settings_that_affect_the_outcome(tmp_path):
    def key(*overrides):
        return make_plan(CONFIGS, tmp_path, overrides, "llama-8b-base-fpb-evaluate")[0].key

    assert key() == key("max_wait_s=5") == key("tracking.wandb=offline")
    assert key() != key("data.max_test_examples=5")


def test_pattern_without_a_step_and_folder_without_rows_are_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"--only 'x\*' matches none of 78 steps: their names are llama-8b-memory-16bit-evaluate"
    ):
        make_plan(CONFIGS, tmp_path, [], "x*")
    with pytest.raises(ConfigError, match=r"lacks 24 of 24 rows"):
        make_plan(tmp_path, tmp_path, [])
