"""A base that is not the paper's is set beside its 8B: scores by task and variant, and costs."""

from __future__ import annotations

from made_results import LLAMA, make_evaluation, make_training, print_report

from finlora.report.other_base import other_base_tables
from finlora.report.pairing import pair_results

SMALL = "/bases/SmolLM2-135M-Instruct"


def score(accuracy=0.8, row="fpb", seed=0, **changes):
    name = f"small-{changes.get('variant', '4bit-r4')}-{row}-seed{seed}"
    changes = {"base": SMALL, "run": name, "adapter": f"/runs/{name}/adapter", "adapter_hash": name} | changes
    return make_evaluation(accuracy, **changes)


def trained(row="fpb", seed=0, **changes):
    name = f"small-4bit-r4-{row}-seed{seed}"
    own = {"base": SMALL, "run": name, "adapter": f"/runs/{name}/adapter", "adapter_hash": name, "task": "fpb"}
    return make_training(**(own | changes))


def tables(*results):
    return {table.title: table for table in other_base_tables(pair_results(results))}


SCORES, COST = (f"Beside the paper's 8B: {kind} of SmolLM2-135M-Instruct" for kind in ("scores", "cost"))


def test_scores_stand_beside_the_papers_with_mean_and_spread():
    found = tables(
        score(0.4, variant="base", run=None, adapter=None, adapter_hash=None),
        score(0.80, seed=0),
        score(0.84, seed=1),
        score(0.9, variant="8bit-r8"),
    )
    interval = "40.0 (38.0–41.0)"
    assert found[SCORES].rows == (
        ("fpb", "base", "68.73", interval, interval, "1"),
        ("fpb", "4bit-r4", "86.30", "82.0 ± 2.8", "82.0 ± 2.8", "2"),
        ("fpb", "8bit-r8", "not kept here", "90.0 (88.0–91.0)", "90.0 (88.0–91.0)", "1"),
    )


def test_adapter_of_one_task_is_preferred_and_others_are_marked():
    alone, many = trained(), trained("classification", task="fpb+tfns+ner")
    both = [score(0.8), score(0.7, row="classification"), score(0.6, row="classification", task="nwgi")]
    rows = tables(alone, many, *both, score(0.5, row="classification", task="tfns"))[SCORES].rows
    assert [(row[0], row[1], row[3][:4]) for row in rows] == [
        ("fpb", "4bit-r4", "80.0"),
        ("tfns", "4bit-r4 (of several tasks)", "50.0"),
        ("nwgi", "4bit-r4 (not trained on it)", "60.0"),
    ]


def test_cost_has_memory_of_the_few_examples_and_means_of_runs():
    memory = {"variant": "base", "run": None, "adapter": None, "adapter_hash": None, "task": "ner", "gpu_hours": 0.1}
    found = tables(
        score(peak_memory_gib=0.5, config={"eval": {"batch_size": 1}}, is_partial=True, **memory),
        score(peak_memory_gib=2.5, config={"eval": {"batch_size": 64}}, seconds_per_example=0.002, **memory),
        trained("ner", 0, task="ner", peak_memory_gib=4.0, gpu_hours=0.02, adapter_mib=0.6),
        trained("ner", 1, task="ner", peak_memory_gib=6.0, gpu_hours=0.04, adapter_mib=0.6),
    )[COST].rows
    assert found == (
        ("memory at batch 1, GiB", "8 bit", "any task", "8.60", "0.5000", "1"),
        ("adapter, MiB", "4bit-r4", "any task", "4.50", "0.6000", "2"),
        ("training memory, GiB", "4bit-r4", "ner", "83.60", "5.0000", "2"),
        ("GPU-hours", "4bit-r4", "ner", "3.08", "0.0300", "2"),
        ("s/example", "8 bit", "ner", "0.10", "0.0020", "1"),
    )


def test_papers_own_bases_and_random_weights_have_no_such_table():
    random = {"model": {"weights": "random"}}
    assert tables(make_evaluation(base=LLAMA), score(config=random), score(task="synthetic_sentiment")) == {}
    text = print_report([score()])
    assert SCORES in text
    assert COST not in text
