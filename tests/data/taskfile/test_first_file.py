"""First task file of a table: it can be read and prepared, and its guesses are marked."""

from __future__ import annotations

import json

import pytest
from letters import make_rows

from finlora.data.taskfile.first_file import write_first_file
from finlora.data.taskfile.load import load_task_file
from finlora.data.taskfile.read import open_task_file
from finlora.errors import ConfigError, DatasetError


@pytest.fixture
def guess(write_rows, tmp_path):
    """Return the first task file of a table, read back, and its guesses."""

    def look(rows, name="rows.csv", label=None):
        file = write_first_file(write_rows(rows, name), tmp_path, ["fpb"], label)
        (tmp_path / "first.yaml").write_text(file.text, encoding="utf-8")
        return load_task_file(tmp_path / "first.yaml"), file

    return look


def test_columns_labels_and_split_of_a_table(guess, tmp_path, read_task):
    rows = make_rows(
        60,
        letter_id=lambda row: f"L{row}",
        customer=lambda row: f"c{row % 12}",
        received=lambda row: f"{1 + row % 28:02}/{1 + row % 12:02}/2024",
        weight=lambda row: row + 1,
        desk=lambda row: "NS"[row % 2],
    )
    task, file = guess(rows)
    assert (task.kind, task.columns.text, task.columns.label) == ("choice", "text", "label")
    assert (task.columns.id, task.columns.group, task.columns.time) == ("letter_id", "customer", "received")
    assert (task.columns.weight, task.columns.segments, task.time_format) == ("weight", ("desk",), "%d/%m/%Y")
    assert (task.choices, task.split.by, task.split.keep_together) == (("0", "1"), "time", "group")
    assert any("a code? Name it in words; 30 rows" in line for line in file.lines)
    assert len(file.guesses) == sum("# guess: " in line for line in file.lines) > 8
    splits = open_task_file(tmp_path / "first.yaml")
    assert splits.choices == ("0", "1")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda row: {"question": "Is it?", "label": ("Yes", "No")[len(row["text"]) % 2]}, "yes_no"),
        (lambda row: {"topics": "loan|card" if "amber" in row["text"] else "fee"}, "multi"),
        (
            lambda row: {"question": "How much?", "value": str(1000 + len(row["text"]) * 7 + hash(row["text"]) % 1000)},
            "number",
        ),
        (lambda row: {"completion": f"Answer to {row['text']}"}, "text"),
    ],
)
def test_kind_follows_from_what_the_columns_hold(guess, change, kind):
    rows = [{"text": row["text"], **change(row)} for row in make_rows(40)]
    assert guess(rows)[0].kind == kind


@pytest.mark.parametrize(
    ("row", "preset", "kind"),
    [
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "openai", "chat"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "sharegpt", "chat"),
        ({"instruction": "a", "input": "", "output": "b"}, "alpaca", "text"),
        ({"text": "a", "label": "x", "answer": "accept"}, "prodigy", "choice"),
        (
            {"data": {"text": "a"}, "annotations": [{"result": [{"value": {"choices": ["x"]}}]}]},
            "label_studio",
            "choice",
        ),
        ({"text": "a", "label": ["x"]}, "doccano", "choice"),
        (
            {"fields": {"text": "a"}, "responses": {"label": [{"value": "x", "status": "submitted"}]}},
            "argilla",
            "choice",
        ),
    ],
)
def test_exports_are_recognised_by_their_keys(guess, row, preset, kind):
    task, _ = guess([row, json.loads(json.dumps(row).replace('"x"', '"y"'))], "rows.jsonl")
    assert (task.preset, task.kind) == (preset, kind)


def test_name_is_not_a_built_in_tasks(guess):
    assert guess(make_rows(20), "fpb.csv")[0].name == "fpb_own"
    assert guess(make_rows(20), "2024 Letters!.csv")[0].name == "t_2024_letters"


def test_table_with_nothing_to_learn_is_refused(guess):
    with pytest.raises(DatasetError, match=r"no column holds texts: found a"):
        guess([{"a": "1"}])
    with pytest.raises(DatasetError, match=r"found text, note; no column holds labels \(2 to 100 values\) or answers"):
        guess([{"text": row["text"], "note": row["text"][::-1]} for row in make_rows(20)])


def test_labels_with_blanks_are_mapped_and_empty_ones_skipped(guess):
    rows = make_rows(20)
    rows[3]["label"], rows[5]["label"], rows[7]["label"] = "", " good", " good"
    task, _ = guess(rows)
    assert task.unlabelled == "skip"
    assert any(label.value == "good" and label.from_ == (" good",) for label in task.labels)


def test_spellings_of_one_label_are_one_label_named_by_the_most_frequent(guess):
    rows = make_rows(20)
    for row in rows:
        row["label"] = "good" if row["label"] == "1" else "bad"
    rows[1]["label"], rows[3]["label"] = " GOOD ", "Good"
    task, file = guess(rows)
    assert [(label.value, label.from_) for label in task.labels] == [("bad", ()), ("good", (" GOOD ", "Good"))]
    assert '"good": 3 spellings of one label; 10 rows' in " ".join(file.guesses).replace(", from", "")


def test_rows_without_a_text_are_skipped_with_their_number(guess, read_task):
    rows = make_rows(20)
    rows[3]["text"] = rows[9]["text"] = " "
    task, file = guess(rows)
    assert task.textless == "skip"
    assert "textless: 2 rows without a text, left out" in file.guesses


def test_label_column_is_chosen_or_guessed_and_the_others_are_named(guess):
    rows = make_rows(40, desk=lambda row: "NS"[row % 2], answered=lambda row: ("soon", "late", "never")[row % 3])
    rows = [{key: value for key, value in row.items() if key != "label"} for row in rows]
    task, file = guess(rows)
    assert task.columns.label == "desk"
    assert any("or is it answered (3)? Then: --label NAME --overwrite" in line for line in file.guesses)
    task, file = guess(rows, label="answered")
    assert (task.columns.label, task.choices) == ("answered", ("late", "never", "soon"))
    assert not any(line.startswith("label: ") for line in file.guesses)
    with pytest.raises(ConfigError, match=r"--label answer: rows.csv has no such column: found text, desk, answered"):
        guess(rows, label="answer")
    rows = [{**row, "code": str(number)} for number, row in enumerate(make_rows(120))]
    with pytest.raises(ConfigError, match=r"--label code: found 120 values in rows.csv, expected 2 to 100 labels"):
        guess(rows, label="code")
    export = {"instruction": "a", "input": "", "output": "b"}
    with pytest.raises(ConfigError, match=r"has no such column: it is a tool's export"):
        guess([export], "rows.jsonl", label="output")


def test_columns_inside_an_export_are_named(guess):
    rows = [
        {"data": {"review": f"a {label}", "n": "1"}, "annotations": [{"result": [{"value": {"choices": [label]}}]}]}
        for label in ("x", "y")
    ]
    assert guess(rows, "rows.json")[0].columns.text == "review"
    rows = [
        {"fields": {"q": "a"}, "responses": {"tone": [{"value": label, "status": "submitted"}]}} for label in ("x", "y")
    ]
    columns = guess(rows, "rows.json")[0].columns
    assert (columns.text, columns.label) == ("q", "tone")
