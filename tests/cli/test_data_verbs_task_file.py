"""`finlora prepare --task-file`: what is shown and written, and what is refused before anything is read."""

from __future__ import annotations

import pytest
from letters import write_letters

from finlora.data.sets.prepared import read_prepared


@pytest.fixture
def prepare(call, tmp_path):
    return lambda *more, **changes: call(
        "prepare", "--task-file", write_letters(tmp_path, **changes), "--output", tmp_path / "data", *more
    )


def test_prepared_set_holds_its_task_file(prepare, tmp_path):
    code, shown, _ = prepare(columns={"weight": "w", "segments": ["desk"]}, licence="internal")
    assert code == 0
    assert "Labels of test: " in shown
    assert f"Written to {tmp_path / 'data' / 'letters'}" in " ".join(shown.split())
    split = read_prepared(tmp_path / "data", "letters", "train")
    assert (len(split.examples), split.licence, split.source) == (32, "internal", "task file letters.yaml")
    assert "instruction: What is the tone?" in split.card
    assert {item.weight for item in split.examples} == {1.0, 2.0}
    assert {item.segments for item in split.examples} == {("N",), ("S",)}
    assert "already holds the same set" in prepare(columns={"weight": "w", "segments": ["desk"]}, licence="internal")[1]


def test_changed_prompt_in_the_way_names_both_hashes(prepare):
    prepare()
    code, _, said = prepare(prompt={"instruction": "What is the mood?"})
    assert code == 3
    assert "letters (task hash " in said
    assert prepare("--overwrite", prompt={"instruction": "What is the mood?"})[0] == 0


@pytest.mark.parametrize(
    ("more", "changes", "words"),
    [
        (("fpb",), {}, "give a built-in task (`finlora prepare list` shows them) or --task-file FILE, and not both"),
        (("--splits", "test"), {}, "a task file says all this itself"),
        ((), {"name": "fpb"}, "name=fpb is a built-in task: choose another name"),
        ((), {"columns": {"text": "txt"}}, "did you mean text?"),
    ],
)
def test_refusals(prepare, more, changes, words):
    code, _, said = prepare(*more, **changes)
    assert (code, words in said) == (2, True)


def test_prepare_alone_asks_for_a_task(call):
    code, _, said = call("prepare")
    assert (code, "give a built-in task" in said) == (2, True)


def test_new_task_writes_a_file_that_can_be_prepared(call, tmp_path):
    write_letters(tmp_path).unlink()
    code, shown, _ = call("new-task", tmp_path / "rows.csv")
    assert code == 0
    assert "Guessed instruction: write the question as a colleague would ask it" in shown
    assert f"then: finlora prepare --task-file {tmp_path / 'rows.yaml'}" in shown
    code, shown, _ = call("prepare", "--task-file", tmp_path / "rows.yaml", "--output", tmp_path / "data")
    assert (code, "Labels of test: " in shown) == (0, True)
    code, _, said = call("new-task", tmp_path / "rows.csv")
    assert (code, "is there already: pass --overwrite" in said) == (2, True)
    code, _, said = call("new-task", tmp_path / "absent.csv", "--output", tmp_path / "b.yaml")
    assert (code, "is not a file: expected a table" in said) == (2, True)


def test_new_task_writes_an_example_table_with_the_faults_of_a_real_one(call, tmp_path):
    code, shown, _ = call("new-task", tmp_path / "letters.csv", "--example")
    assert (code, "Example table of 720 generated letters" in shown) == (0, True)
    table = (tmp_path / "letters.csv").read_bytes()
    assert table.startswith(b"\xef\xbb\xbfletter_id,received,channel,letter,department\n")
    code, shown, _ = call("prepare", "--task-file", tmp_path / "letters.yaml", "--dry-run")
    shown = " ".join(shown.split())
    assert (code, "Left out 5 of 720 rows without a text (textless: skip)." in shown) == (0, True)
    assert all(f"{label} " in shown for label in ("cards", "fees", "loans", "online", "service"))
    assert "8 rows repeat a text" in shown
    code, _, said = call("new-task", tmp_path / "letters.csv", "--example", "--overwrite")
    assert (code, "is there already: --example writes a new file" in said) == (2, True)
    (tmp_path / "letters.csv").unlink()
    call("new-task", tmp_path / "letters.csv", "--example", "--overwrite")
    assert (tmp_path / "letters.csv").read_bytes() == table
    code, _, said = call("new-task", tmp_path / "letters.json", "--example", "--output", tmp_path / "other.yaml")
    assert (code, "is not a CSV file: --example writes a new file" in said) == (2, True)
