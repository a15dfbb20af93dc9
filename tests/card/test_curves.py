"""Figures from single answers: abstention, lengths, rows from before the base's cut-off."""

from __future__ import annotations

import pytest
from carded import make_table
from made_results import make_evaluation

from finlora.card.curves import make_abstention_curve, slice_by_cutoff, slice_by_length, trace_abstention

CALIBRATION = [
    {"low": 0.5, "high": 0.6, "count": 20.0, "confidence": 0.55, "accuracy": 0.5},
    {"low": 0.9, "high": 1.0, "count": 60.0, "confidence": 0.97, "accuracy": 0.9},
]


def test_abstention_keeps_rows_from_the_threshold_on():
    table = make_table([True, False, True, False], probability=[0.99, 0.9, 0.55, 0.3])
    curve = make_abstention_curve(make_evaluation(), table, 1)
    assert [(each.name, each.num_rows, each.share) for each in curve] == [
        *(("0", 4, 1.0), ("0.5", 3, 0.75), ("0.6", 2, 0.5), ("0.7", 2, 0.5), ("0.8", 2, 0.5), ("0.9", 2, 0.5)),
        *(("0.95", 1, 0.25), ("0.99", 1, 0.25)),
    ]
    assert [each.accuracy for each in curve] == [0.5, pytest.approx(2 / 3), 0.5, 0.5, 0.5, 0.5, 1.0, 1.0]
    assert all(0 <= each.low <= each.accuracy <= each.high <= 1 for each in curve)
    assert trace_abstention(table) == [(0.25, 1.0), (0.5, 0.5), (0.75, pytest.approx(2 / 3)), (1.0, 0.5)]


def test_abstention_without_answers_comes_from_the_bins():
    whole, sure = make_abstention_curve(make_evaluation(calibration=CALIBRATION), None, 1)
    assert (whole.name, whole.num_rows, whole.share, whole.accuracy) == ("0", 80, 1.0, pytest.approx(64 / 80))
    assert (sure.name, sure.num_rows, sure.share, sure.accuracy) == ("0.9", 60, 0.75, pytest.approx(0.9))


def test_generated_answers_have_no_curve():
    assert make_abstention_curve(make_evaluation(), make_table([True], probability=[None]), 1) == []
    assert make_abstention_curve(make_evaluation(), None, 1) == []


def test_lengths_are_cut_into_four_groups_of_equal_size():
    slices = slice_by_length(make_table([True] * 4 + [False] * 4), 1)
    assert [(each.name, each.num_rows, each.accuracy) for each in slices] == [
        ("1 to 2 characters", 2, 1.0),
        ("3 to 4 characters", 2, 1.0),
        ("5 to 6 characters", 2, 0.0),
        ("7 to 8 characters", 2, 0.0),
    ]
    (only,) = slice_by_length(make_table([True] * 3, chars=[5, 5, 5]), 1)
    assert (only.name, only.num_rows) == ("5 to 5 characters", 3)
    assert sum(each.num_rows for each in slice_by_length(make_table([True] * 2), 1)) == 2


def test_rows_are_told_apart_by_the_last_day_of_the_bases_data():
    times = ["2023-12-31", "2023-12-31T23:00:00", "2024-01-01", ""]
    slices = slice_by_cutoff(make_table([True, False, True, True], time=times), "2023-12-31", 1)
    assert [(each.name, each.num_rows, each.accuracy) for each in slices] == [
        ("dated up to 2023-12-31", 2, 0.5),
        ("dated after 2023-12-31", 1, 1.0),
        ("without a date", 1, 1.0),
    ]


def test_rows_of_one_group_give_a_wide_interval():
    flags = [True] * 10 + [False] * 10
    alone = slice_by_cutoff(make_table(flags), "2023-12-31", 1)[0]
    grouped = slice_by_cutoff(make_table(flags, groups=[row // 5 for row in range(20)]), "2023-12-31", 1)[0]
    assert grouped.high - grouped.low > alone.high - alone.low
