"""Rows of a user's table: an error names the row and what to do, and rows that are left out are counted."""

from __future__ import annotations

import pytest
from letters import make_rows

from finlora.data.taskfile.items import read_number, read_time
from finlora.data.taskfile.load import task_file_from_tree
from finlora.errors import ConfigError, DatasetError

from_number = {"name": "n", "kind": "number", "source": {"files": "a.csv"}, "prompt": {"instruction": "How much?"}}


def test_missing_column_names_near_ones(write_rows, read_task):
    write_rows([{"txt": "a", "lbl": "0"}])
    with pytest.raises(ConfigError) as caught:
        read_task(columns={"group": "weather"})
    assert caught.value.faults == [
        "columns.text is 'text', a column that rows.csv does not have: found txt, lbl; did you mean txt?",
        "columns.label is 'label', a column that rows.csv does not have: found txt, lbl; did you mean lbl?",
        "columns.group is 'weather', a column that rows.csv does not have: found txt, lbl; name the right one under "
        "`columns.group`.",
    ]


def test_undeclared_labels_are_reported_with_their_rows(write_rows, read_task):
    rows = make_rows(12)
    for row in rows[:4]:
        row["label"] = "Good "
    rows[5]["label"] = "-1"
    write_rows(rows)
    with pytest.raises(
        DatasetError, match=r"'Good ' \(4 rows\), '-1' \(1 row\) of 12.*add each under `from`.*unlabelled: skip"
    ):
        read_task()
    splits = read_task(unlabelled="skip")
    assert len(splits.train) + len(splits.test) == 7
    assert "Left out 5 of 12 rows, whose label is not declared: 'Good ' 4, '-1' 1 (unlabelled: skip)." in splits.notes


def test_empty_label_is_reported_with_its_row(write_rows, read_task):
    rows = make_rows(10)
    rows[6]["label"] = ""
    write_rows(rows)
    with pytest.raises(
        DatasetError, match=r'rows.csv:8: column label is empty, as in 1 of 10 rows.*"NA", "null" and "None" are'
    ):
        read_task()
    assert any("Left out 1 of 10 rows without a label" in note for note in read_task(unlabelled="skip").notes)


def test_empty_texts_are_reported_together_or_left_out(write_rows, read_task):
    rows = make_rows(10)
    rows[2]["text"], rows[6]["text"] = "", " "
    write_rows(rows)
    with pytest.raises(
        DatasetError, match=r"rows.csv:4: column text is empty, as in 2 of 10 rows \(4, 8\).*or set textless: skip"
    ):
        read_task()
    splits = read_task(textless="skip")
    assert len(splits.train) + len(splits.test) == 8
    assert "Left out 2 of 10 rows without a text (textless: skip)." in splits.notes


def test_na_null_and_none_are_labels(write_rows, read_task):
    write_rows([{**row, "label": ("NA", "null", "None")[number % 3]} for number, row in enumerate(make_rows(30))])
    splits = read_task(labels=["NA", "null", "None"])
    assert {item.label for item in (*splits.train, *splits.test)} == {"NA", "null", "None"}


def test_repeated_identifiers_are_counted(write_rows, read_task):
    write_rows(make_rows(9, letter_id=lambda row: f"L{row % 7}"))
    with pytest.raises(
        DatasetError, match=r"letter_id repeats 2 times \('L0' 2 times, 'L1' 2 times\): expected each identifier"
    ):
        read_task(columns={"id": "letter_id"})


def test_labels_of_one_row_or_none_are_reported(write_rows, read_task):
    rows = make_rows(20)
    rows[3]["label"] = "rare"
    write_rows(rows)
    notes = "\n".join(read_task(labels=["0", "1", "rare", "never"]).notes)
    assert "Warning: train has no row of never: take it out of `labels`, or split otherwise." in notes
    assert "has a single row of rare: its scores mean little." in notes
    assert "the rarest is never with 0 of" in notes


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        (
            "03/04/2024",
            None,
            'ambiguous, the day or the month could come first: give time_format: "%d/%m/%Y" or "%m/%d/%Y"',
        ),
        ("13.04.24", None, 'give time_format: "%d.%m.%y" or "%m.%d.%y"'),
        ("2024", None, "found '2024', expected a date such as 2024-12-31: give time_format"),
        ("", None, "found '', expected a date"),
        ("2024-04-03", "%d/%m/%Y", "found '2024-04-03', expected a time of the format time_format='%d/%m/%Y'"),
    ],
)
def test_ambiguous_or_malformed_time_is_refused(text, form, words):
    with pytest.raises(DatasetError) as caught:
        read_time(text, form, "rows.csv:2", "when")
    assert str(caught.value).startswith("rows.csv:2, column when: ")
    assert words in str(caught.value)


def test_times_are_compared_in_utc():
    assert read_time("2024-04-03T01:00:00+02:00", None, "", "").isoformat() == "2024-04-02T23:00:00"
    assert read_time("03/04/2024", "%d/%m/%Y", "", "").isoformat() == "2024-04-03T00:00:00"


@pytest.mark.parametrize(
    ("value", "number", "expected"),
    [
        ("1,234.50", {}, "1234.50"),
        ("1.234,5", {"decimal_mark": ","}, "1234.5"),
        ("1 234", {}, "1234"),
        ("\N{MINUS SIGN}7", {}, "-7"),
        (2540000000, {}, "2540000000"),
        (0.125, {"decimals": 2}, "0.12"),
        ("3", {"decimals": 1}, "3.0"),
    ],
)
def test_numbers_are_written_with_a_point(value, number, expected):
    assert read_number(task_file_from_tree({**from_number, "number": number}), value, "a:1") == expected


@pytest.mark.parametrize("value", ["1.234,5", "12 m", "$5", "", None, True, float("nan"), "1,23"])
def test_value_that_is_not_a_number_is_refused(value):
    with pytest.raises(
        DatasetError, match=r"a:1, column answer: found .*expected a number with '.' before its decimals"
    ):
        read_number(task_file_from_tree(from_number), value, "a:1")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        (
            [{"from": "human", "value": "a"}],
            "found from, value, expected an object with role and content. Keys from and value",
        ),
        (
            [{"role": "user", "content": "a"}],
            "chats.jsonl:1 ends with a user turn: expected the assistant's answer last",
        ),
        ([{"role": "tool", "content": "a"}], "found the role 'tool', expected one of user, human, assistant"),
        ([{"role": "assistant", "content": "a"}], "has no user turn"),
        ([{"role": "user", "content": " "}], "message 1: found ' ', expected a text"),
        ([], "expected a list of messages"),
    ],
)
def test_malformed_conversation_is_refused(write_rows, read_task, messages, words):
    write_rows([{"messages": messages}], "chats.jsonl")
    with pytest.raises(DatasetError, match=words):
        read_task(kind="chat", labels=None, prompt=None, source={"files": "chats.jsonl"})


def test_sharegpt_without_its_preset_names_it(write_rows, read_task):
    write_rows([{"conversations": [{"from": "human", "value": "a"}]}], "chats.jsonl")
    with pytest.raises(ConfigError, match="use preset: sharegpt, which reads `conversations`"):
        read_task(kind="chat", labels=None, prompt=None, source={"files": "chats.jsonl"})


def test_weight_must_be_positive(write_rows, read_task):
    write_rows(make_rows(10, w=lambda row: row))
    with pytest.raises(DatasetError, match=r"rows.csv:2, column w: found '0', expected a weight of more than 0"):
        read_task(columns={"weight": "w"})
