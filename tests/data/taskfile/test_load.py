"""Task files: wrong keys are named with similar ones, and all faults of a file are in one error."""

from __future__ import annotations

import dataclasses
import re

import pytest
import yaml
from letters import LETTERS

from finlora.data.taskfile.load import load_task_file, read_card, task_file_from_tree
from finlora.data.taskfile.record import hash_question, render_card
from finlora.errors import ConfigError


def test_card_reads_back_equal(write_task):
    task = load_task_file(
        write_task(
            columns={"id": "n", "segments": ["desk", "country"]},
            prompt={
                "system": "You label.\nBriefly.",
                "instruction": "Tone?",
                "example": {"text": "Hm", "label": "bad"},
            },
        )
    )
    assert read_card(render_card(task)) == task
    assert task.labels[1].from_ == ("1",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": [True, False]}, r'labels\[0\] is true, not a text: YAML reads Yes, No.* Write "Yes" in quotes'),
        ({"labels": [{"value": False}, "b"]}, r'labels\[0\].value is false.*Write "No" in quotes'),
        ({"labels": ["a", None]}, r'labels\[1\] is null, not a text: write "null"'),
        ({"lables": []}, "lables is not a setting: did you mean labels"),
        ({"columns": {"txt": "a"}}, r"columns.txt is not a setting: did you mean text"),
        ({"kind": "choices"}, "kind='choices': expected one of choice, yes_no, multi"),
        ({"name": "My letters"}, "name='My letters': expected a to z"),
        ({"labels": ["one"]}, "labels holds 1: expected at least two for kind choice"),
        ({"labels": ["a", {"value": "b", "from": ["a"]}]}, "'a' stands for more than one label"),
        ({"labels": [" a", "b"]}, "white space at its start or end: put what the data has under `from`"),
        ({"labels": ["a\nb", "c"]}, "labels are shown in tables: expected no line breaks"),
        ({"source": {}}, "source: expected one of `files`"),
        ({"source": {"train": "a.csv"}}, "source names only one of `train` and `test`"),
        ({"source": {"hub": "a/b", "revision": "main"}}, "source.revision='main': expected the commit"),
        ({"prompt": None}, "prompt.instruction is missing"),
        ({"prompt": {"instruction": "?", "example": {"text": "a", "label": "x"}}}, "expected one of bad, good"),
        ({"preset": "openai"}, "preset openai needs kind chat, found kind choice"),
        ({"split": {"by": "time"}}, "split by time: expected columns.time and split.test_from"),
        ({"split": {"by": "group"}}, "split by group: expected columns.group"),
        ({"split": {"by": "files"}}, "split by files: expected source: {train: FILE, test: FILE}"),
        ({"split": {"test_share": 1.0}}, "split.test_share=1.0: expected more than 0 and less than 1"),
        ({"split": {"keep_together": "group"}}, "split.keep_together=group: expected a split by time"),
        (
            {"labels": [{"value": "a"}, 3.5, {"values": "c"}]},
            r"labels\[2\].values is not a setting: did you mean value",
        ),
    ],
)
def test_wrong_key_is_named_in_the_error(write_task, changes, words):
    with pytest.raises(ConfigError, match=words):
        load_task_file(write_task(**changes))


def test_faults_are_reported_together(write_task):
    with pytest.raises(ConfigError) as caught:
        load_task_file(write_task(labels=[True, "b"], columns={"tekst": "x"}, kind="choise"))
    assert len(caught.value.faults) == 3
    assert all(fault.startswith("task file task.yaml: ") for fault in caught.value.faults)


@pytest.mark.parametrize(("text", "words"), [("[", "not valid YAML"), ("- a", "expected keys like `name:`")])
def test_file_that_is_not_a_mapping_is_refused(tmp_path, text, words):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_task_file(tmp_path / "t.yaml")
    with pytest.raises(ConfigError, match="does not exist: `finlora new-task DATA` writes a first one"):
        load_task_file(tmp_path / "absent.yaml")


def test_short_forms_are_written_out():
    task = task_file_from_tree(
        {**LETTERS, "kind": "yes_no", "labels": None, "source": {"files": {"train": "a.csv", "test": "b.csv"}}}
    )
    assert task.choices == ("Yes", "No")
    assert (task.source.train, task.source.test, task.split_by) == ("a.csv", "b.csv", "files")
    assert task_file_from_tree({**LETTERS, "labels": ["a", 2]}).choices == ("a", "2")


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({"title": "x", "licence": "y", "columns": {"text": "t"}, "split": {"seed": 5}}, True),
        ({"labels": [{"value": "bad", "from": ["-"]}, {"value": "good"}]}, True),
        ({"prompt": {"instruction": "What is the mood?"}}, False),
        ({"labels": ["good", "bad"]}, False),
        ({"labels": [{"value": "bad", "means": "worse off"}, "good"]}, False),
    ],
)
def test_hash_covers_only_what_is_asked(changes, is_same):
    one = task_file_from_tree(yaml.safe_load(yaml.safe_dump(LETTERS)))
    assert (hash_question(task_file_from_tree({**LETTERS, **changes})) == hash_question(one)) is is_same


def test_record_is_frozen():
    task = task_file_from_tree(LETTERS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"
    assert re.fullmatch("[0-9a-f]{64}", hash_question(task))
