"""The rows on the public base: each task, variant and seed once, and the Llama rows unchanged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from finlora.reproduce.paper_rows import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def plan(tmp_path, only="*", seeds=(), **bases):
    return make_plan(CONFIGS, tmp_path, [], only, bases or {"135m": "/bases/small"}, seeds)


def test_every_task_is_scored_by_the_base_and_by_three_adapters_of_each_seed(tmp_path):
    steps = plan(tmp_path, seeds=(0, 1, 2))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    kinds = Counter((step.kind, step.of_adapter) for step in steps)
    # 9 rows x 3 variants x 3 seeds; their scores, with NWGI's; the base: 9 tasks at 3 numbers of bits, and 3 memory steps.
    assert kinds == {("train", True): 81, ("evaluate", True): 90, ("evaluate", False): 30}
    assert {step.config.model.base for step in steps} == {"/bases/small"}
    for step in steps:
        if step.kind == "train":
            bits, rank = step.config.model.bits, step.config.lora.rank
            assert f"-{bits}bit-r{rank}-" in step.name
            assert step.name.endswith(f"-seed{step.config.seed}-train")
            assert "nwgi" not in step.config.data.tasks
        if step.of_adapter and step.kind == "evaluate":
            assert names.index(f"{step.config.name}-train") < names.index(step.name)
    assert names.index("smollm2-135m-4bit-r4-xbrl-seed0-train") < names.index("smollm2-135m-4bit-r4-fpb-seed1-train")


def test_base_is_scored_at_each_number_of_bits(tmp_path):
    scored = plan(tmp_path, "smollm2-135m-base-*")
    found = Counter((step.config.eval.bits, task) for step in scored for task in step.config.data.tasks)
    tasks = ("fpb", "fiqa_paper", "fiqa", "tfns", "headline", "ner", "nwgi", "synthetic_formulas")
    tasks += ("xbrl_tags", "xbrl_values")
    assert found == {(bits, task): 1 for bits in (16, 8, 4) for task in tasks}


def test_adapter_of_several_tasks_also_answers_the_one_it_was_not_trained_on(tmp_path):
    train, evaluate, nwgi = plan(tmp_path, "smollm2-135m-8bit-r8-classification-*")
    assert train.config.data.tasks == evaluate.config.data.tasks == ("fpb", "fiqa_paper", "tfns", "headline", "ner")
    assert nwgi.config.data.tasks == ("nwgi",)
    assert train.adapter == evaluate.adapter == nwgi.adapter
    assert nwgi.name == "smollm2-135m-8bit-r8-classification-nwgi-evaluate"


def test_llama_rows_are_planned_without_the_public_base_or_where_they_are_named(tmp_path):
    llamas = [step.name for step in make_plan(CONFIGS, tmp_path, [])]
    assert not any("smollm2" in name for name in llamas)
    both = [step.name for step in plan(tmp_path, **{"135m": "/bases/small", "8b": "/bases/8b"})]
    assert both[: len(plan(tmp_path))] == [step.name for step in plan(tmp_path)]
    assert both[len(plan(tmp_path)) :] == [name for name in llamas if "-8b-" in name]


def test_seeds_repeat_adapters_of_llamas_too(tmp_path):
    names = [step.name for step in make_plan(CONFIGS, tmp_path, [], "llama-8b-*-fpb-*", seeds=(5,))]
    assert names == [
        "llama-8b-base-fpb-evaluate",
        "llama-8b-4bit-r4-fpb-seed5-train",
        "llama-8b-4bit-r4-fpb-seed5-evaluate",
        "llama-8b-8bit-r8-fpb-seed5-train",
        "llama-8b-8bit-r8-fpb-seed5-evaluate",
    ]
