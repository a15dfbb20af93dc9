"""Splits: no group in both, no test date before a training date, duplicates together, and the published permutation."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from letters import LETTERS, make_rows

from finlora.data.taskfile.items import make_items
from finlora.data.taskfile.load import task_file_from_tree
from finlora.data.taskfile.own_tables import TableRow
from finlora.data.taskfile.split import hold_out_latest, split_items
from finlora.errors import DatasetError

ROW = st.tuples(st.integers(0, 5), st.integers(0, 400), st.integers(0, 12))
"""Customer, day and text of a row."""
TEXTS = [row["text"] for row in make_rows(13)]


def split(rows, rule, **columns):
    task = task_file_from_tree({**LETTERS, "split": rule, "columns": columns})
    items = make_items(task, [TableRow(row, f"rows.csv:{n}", "") for n, row in enumerate(rows, 2)], [])
    return split_items(task, items)


def tabulate(values):
    start = date(2024, 1, 1)
    return [
        {"text": TEXTS[text], "label": "1", "who": f"c{who}", "when": (start + timedelta(days=day)).isoformat()}
        for who, day, text in values
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=40), st.integers(0, 60), st.booleans())
def test_time_split_tests_the_later_rows_of_whole_groups(values, gap, keeps):
    rows = tabulate(values)
    rule = {"by": "time", "test_from": "2024-08-01", "gap_days": gap}
    if keeps:
        rule["keep_together"] = "group"
    try:
        parts = split(rows, rule, time="when", group="who")
    except DatasetError:  # train or test is empty
        reject()
    train, test = [rows[row] for row in parts.train], [rows[row] for row in parts.test]
    latest, earliest = max(row["when"] for row in train), min(row["when"] for row in test)
    assert latest < earliest
    assert date.fromisoformat(latest) < date(2024, 8, 1) - timedelta(days=gap)
    assert not {row["text"] for row in train} & {row["text"] for row in test}
    if keeps:
        assert not {row["who"] for row in train} & {row["who"] for row in test}
    left_out = len(rows) - len(train) - len(test)
    assert left_out == sum(int(note.split()[2].replace(",", "")) for note in parts.notes if note.startswith("Left out"))


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=2, max_size=40), st.floats(0.05, 0.9), st.integers(0, 5))
def test_group_split_keeps_groups_whole_and_loses_no_row(values, share, seed):
    rows = tabulate(values)
    try:
        parts = split(rows, {"by": "group", "test_share": share, "seed": seed}, group="who")
    except DatasetError:  # all rows are in one group
        reject()
    assert sorted((*parts.train, *parts.test)) == list(range(len(rows)))
    for key in ("who", "text"):
        assert not {rows[row][key] for row in parts.train} & {rows[row][key] for row in parts.test}


def test_share_of_rows_apart_is_the_published_permutation():
    rows = make_rows(101)
    parts = split(rows, {"by": "share", "test_share": 0.25, "seed": 42, "duplicates": "apart"})
    order = np.random.default_rng(42).permutation(101)
    assert (list(parts.test), list(parts.train)) == (list(order[:26]), list(order[26:]))


def test_huge_group_does_not_become_the_test():
    rows = make_rows(100, who=lambda row: "big" if row < 80 else f"c{row}")
    parts = split(rows, {"by": "group", "test_share": 0.2, "seed": 1}, group="who")
    assert len(parts.test) == 20


def test_leaks_and_two_labels_are_reported():
    rows = [
        *make_rows(20, who=lambda row: f"c{row % 5}"),
        {"text": TEXTS[0], "label": "1", "who": "c9"},
        {"text": TEXTS[1], "label": "1", "who": "c8"},
    ]
    parts = split(rows, {"by": "share", "duplicates": "apart", "seed": 3}, group="who")
    notes = "\n".join(parts.notes)
    assert "2 rows repeat a text; 4 rows are in 2 groups" in notes
    assert "1 texts have more than one label" in notes
    assert "test rows share `who` with train, so scores can be too good. Keep them apart by split: {by: group}" in notes


@pytest.mark.parametrize(
    ("rule", "columns", "words"),
    [
        (
            {"by": "time", "test_from": "2030-01-01"},
            {"time": "when"},
            "no row is on or after test_from 2030-01-01: times go",
        ),
        ({"by": "time", "test_from": "2020-01-01"}, {"time": "when"}, "no row is before test_from and its gap"),
        ({"by": "column", "column": "label"}, {}, "found '0', expected train or test"),
    ],
)
def test_empty_split_is_refused(rule, columns, words):
    rows = make_rows(4, when=lambda row: f"2024-05-0{row + 1}")
    with pytest.raises(DatasetError, match=words):
        split(rows, rule, **columns)


def test_search_holds_out_the_latest_groups():
    times = [
        "2024-01-01T00:00:00",
        "2024-01-05T00:00:00",
        "2024-02-01T00:00:00",
        "2024-03-01T00:00:00",
        "2024-01-02T00:00:00",
    ]
    assert hold_out_latest(times, ["a", "b", "c", "a", "d"], 0.4, 0) == ([1, 2, 4], [3])
    assert hold_out_latest(times, ["a", "b", "c", "d", "e"], 0.4, 0) == ([0, 1, 4], [2, 3])
    assert hold_out_latest(times, ["a", "b", "c", "d", "e"], 0.4, 30) == ([0], [2, 3])
    assert hold_out_latest([times[0]] * 3, ["a", "b", "c"], 0.1, 0) == ([], [0, 1, 2])


def test_time_split_whose_early_rows_are_all_like_later_ones_says_so():
    """Form letters that differ in their digits are one group, which follows its last date into the test."""
    rows = [
        {**row, "text": f"Invoice {day} was booked twice, please call."}
        for day, row in enumerate(tabulate([(0, 1, 0), (1, 400, 0)]))
    ]
    rule = {"by": "time", "test_from": "2024-08-01"}
    with pytest.raises(
        DatasetError, match=r"no row is left for train: of 1 row from before .* shares a nearly equal text with a"
    ):
        split(rows, rule, time="when")
    assert split(rows, {**rule, "duplicates": "apart"}, time="when").train == (0,)
    rows = [{**row, "who": "c1", "text": TEXTS[number]} for number, row in enumerate(rows)]
    whole = {**rule, "duplicates": "apart", "keep_together": "group"}
    with pytest.raises(DatasetError, match=r"shares `who` with a later row, .* Choose another split\.$"):
        split(rows, whole, time="when", group="who")
