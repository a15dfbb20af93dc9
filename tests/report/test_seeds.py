"""Seeds of one row are shown together, with mean and spread."""

from __future__ import annotations

from made_results import make_evaluation, make_scores, print_report

from finlora.report.pairing import pair_results
from finlora.report.seeds import format_spread, group_by_seed, seed_table


def score(accuracy, seed, row="small-4bit-r4-fpb", **changes):
    name = f"{row}-seed{seed}"
    return make_evaluation(
        accuracy, run=name, adapter=f"/runs/{name}/adapter", metrics=make_scores(accuracy), **changes
    )


def test_spread_is_over_seeds_and_interval_of_each_seed():
    results = [score(0.82, 1), score(0.84, 0), score(0.80, 2), score(0.5, 0, row="small-8bit-r8-fpb")]
    (row,) = seed_table(pair_results(results)).rows
    # Mean 82, deviations -2, 0 and 2: the variance over n - 1 = 2 is 4.
    assert row[:5] == ("fpb", "small-4bit-r4-fpb\nLlama-3.1-8B-Instruct", "8", "82.0 ± 2.0", "82.0 ± 2.0")
    assert row[5].splitlines() == ["0: 84.0 (82.0–85.0)", "1: 82.0 (80.0–83.0)", "2: 80.0 (78.0–81.0)"]


def test_base_other_tasks_and_other_bits_are_not_of_the_group():
    results = [
        *(score(0.8, seed) for seed in (0, 1)),
        score(0.8, 0, task="tfns"),
        score(0.8, 1, bits=4),
        make_evaluation(0.5, variant="base"),
    ]
    assert [len(group) for group in group_by_seed(pair_results(results).kept)] == [2, 1, 1]
    assert len(seed_table(pair_results(results)).rows) == 1


def test_score_that_a_seed_lacks_has_no_mean():
    one = make_evaluation(0.8)
    assert format_spread([one], "accuracy") == "80.0 (78.0–81.0)"
    assert format_spread([one, make_evaluation(metrics={})], "accuracy") == "not measured"
    free = [make_evaluation(metrics={"accuracy": value}) for value in (0.5, 0.7)]
    assert (format_spread(free, "accuracy"), format_spread(free, "weighted_f1")) == ("60.0 ± 14.1", "none")


def test_report_without_seeds_has_no_table_of_them():
    assert "Over seeds" not in print_report([make_evaluation()])
    assert "Over seeds" in print_report([score(0.8, 0), score(0.9, 1)])


def test_matrix_is_drawn_for_the_first_seed_alone(tmp_path):
    counts = {"negative": {"negative": 3, "positive": 1}, "positive": {"positive": 4}}
    print_report([score(0.8, seed, counts=counts, num_examples=8) for seed in (0, 1)], tmp_path)
    assert len(list(tmp_path.glob("confusion-*.png"))) == 1
