"""Corrections of conversations: read from the table or the audit log, merged with prepared rows, kept out of the test split."""

from __future__ import annotations

import csv
import json

import pytest
from correction_rows import write_corrections

from finlora.data.sets.prepare import prepare_task_file
from finlora.data.sets.prepared import read_prepared
from finlora.data.taskfile.load import task_file_from_tree
from finlora.data.taskfile.read import make_task
from finlora.errors import DatasetError
from finlora.feedback.corrections import read_corrections
from finlora.feedback.next_set import make_next_set
from finlora.serve.accounts.audit import AuditEntry, AuditLog, hash_text

TREE = {"name": "desk", "kind": "chat", "source": {"files": "c.jsonl"}, "prompt": {"system": "Be brief."}}
TASK = make_task(task_file_from_tree(TREE))
PLAIN = make_task(task_file_from_tree({**TREE, "prompt": {}}))
SYSTEM = ("system", "Be brief.")
LONG = [("user", "My card is lost"), ("assistant", "Which one?"), ("user", "The blue one")]


def as_messages(turns):
    return [{"role": role, "content": content} for role, content in turns]


def correct(**values):
    return {"task": "desk", "label": "Block it in the app."} | values


def read(tmp_path, rows, task=TASK, audit=None, name="corrections.jsonl"):
    return read_corrections(write_corrections(tmp_path, rows, name), task, audit).kept


def test_text_is_one_user_message_and_messages_are_a_conversation(tmp_path):
    rows = [correct(text="Is it open?"), correct(messages=as_messages(LONG), answered=" Call us. ")]
    short, long = read(tmp_path, rows)
    assert (short.turns, short.text, short.messages) == ((SYSTEM, ("user", "Is it open?")), "Is it open?", "")
    assert (long.turns, long.text, long.answered) == ((SYSTEM, *LONG), "", "Call us.")
    assert long.compared == "My card is lost\nThe blue one"
    short, long = read(tmp_path, rows, PLAIN)
    assert (short.turns, short.prompt, long.turns) == ((), "Is it open?", tuple(LONG))


def test_csv_field_holds_messages_as_json_and_is_written_so(tmp_path):
    (found,) = read(tmp_path, [correct(messages=json.dumps(as_messages(LONG)))], PLAIN, name="corrections.csv")
    assert found.turns == tuple(LONG)
    assert json.loads(found.messages) == as_messages(LONG)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (correct(text="x", messages=as_messages(LONG)), "text and messages are both filled in"),
        (correct(messages="hello"), "messages='hello': expected JSON, such as"),
        (
            correct(messages=as_messages(LONG[:2])),
            "messages end with a turn of assistant, expected the user's before",
        ),
        (
            correct(messages=[{"role": "tool", "content": "x"}]),
            "found the role 'tool', expected one of user, human, assistant, gpt, system, developer",
        ),
        (correct(messages=[{"from": "human", "value": "x"}]), "expected an object with role and content"),
        (correct(text="x", label=" "), "label is empty"),
        (correct(), "text is empty: fill it in"),
    ],
)
def test_conversation_that_cannot_be_used_is_refused_by_line(tmp_path, row, words):
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, [row])
    assert "corrections.jsonl:1: " in str(caught.value)
    assert words in str(caught.value)


def test_messages_of_a_task_with_labels_are_refused(tmp_path):
    from letters import LETTERS

    rows = [{"task": "letters", "label": "bad", "messages": as_messages(LONG)}]
    with pytest.raises(DatasetError, match="only a task of kind chat has them, give letters a text"):
        read(tmp_path, rows, make_task(task_file_from_tree(LETTERS)))


@pytest.mark.parametrize("has_texts", [True, False])
def test_audit_log_gives_conversations_or_confirms_them(tmp_path, has_texts):
    def entry(name, path, asked, output):
        plain = dict.fromkeys(("key_id", "model", "base_hash", "outcome"), "x")
        numbers = dict.fromkeys(("prompt_tokens", "completion_tokens", "seconds"), 1)
        hashes = {"prompt_hash": hash_text(asked), "output_hash": hash_text(output), "adapter_hash": None}
        texts = {"prompt": asked, "output": output} if has_texts else {}
        return AuditEntry(request_id=name, path=path, **plain, **numbers, **hashes, **texts)

    audit = AuditLog(tmp_path / "audit")
    long, own = json.dumps([list(turn) for turn in LONG]), json.dumps([["developer", "Be brief."], ["user", "Open?"]])
    audit.append(entry("long", "/v1/chat/completions", long, "Call us."))
    audit.append(entry("own", "/v1/chat/completions", own, " Yes."))
    audit.append(entry("extract", "/v1/extract", "Closed?", "No."))
    audit.append(entry("one", "/v1/chat/completions", '[["user", "Late?"]]', "No."))
    audit.close()
    texts = {"long": {"messages": as_messages(LONG)}, "own": {"text": "Open?"}, "extract": {"text": "Closed?"}}
    texts["one"] = {"text": "Late?"}
    rows = [
        correct(request_id=name, label="Yes.") | ({} if has_texts else {**text, "answered": "Yes." * (name == "own")})
        for name, text in texts.items()
    ]
    if not has_texts:
        rows[0]["label"] = "Call us."
    found = read(tmp_path, rows, audit=tmp_path / "audit")
    assert [each.turns for each in found] == [
        (SYSTEM, *LONG),
        *((SYSTEM, ("user", text)) for text in ("Open?", "Closed?", "Late?")),
    ]
    assert [each.answered for each in found] == (
        ["Call us.", "Yes.", "No.", "No."] if has_texts else ["Call us.", "Yes.", "", ""]
    )
    copied = [correct(request_id="chatcmpl-long", messages=as_messages(LONG))]
    assert [each.request_id for each in read(tmp_path, copied, audit=tmp_path / "audit")] == ["long"]
    with pytest.raises(DatasetError, match="request 'long' did not ask desk about this text"):
        read(tmp_path, [correct(request_id="long", text="Something else")], audit=tmp_path / "audit")


def test_next_set_trains_on_new_conversations_and_on_none_of_the_test_split(tmp_path):
    words = ("loan", "card", "fee", "branch", "letter", "rate", "desk", "form", "key", "code")
    rows = []
    for one in words:
        for two in words[:3]:
            turns = [
                ("user", f"{one} {two} matter of mine"),
                ("assistant", "Ask."),
                ("user", f"about the {two} of {one}"),
            ]
            rows.append({"messages": as_messages([*turns, ("assistant", f"See {one}.")])})
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "desk.yaml").write_text(json.dumps({**TREE, "split": {"by": "share", "duplicates": "apart"}}))
    prepare_task_file(tmp_path / "desk.yaml", tmp_path / "data", True, False)
    old = {split: read_prepared(tmp_path / "data", "desk", split) for split in ("train", "test")}
    tested, trained = old["test"].examples[0], old["train"].examples[0]
    table = write_corrections(
        tmp_path,
        [
            correct(messages=as_messages(LONG)),
            correct(text="Where do I find my IBAN?", label="In the app."),
            correct(messages=as_messages(tested.turns)),
            correct(messages=as_messages(trained.turns), label="Better."),
        ],
    )
    made = make_next_set(table, "desk", tmp_path / "data", tmp_path / "next", None, overwrite=False, dry_run=False)
    assert [(fate, owner) for _, fate, owner in made.fates] == [
        *(("added", ""), ("added", ""), ("in test", tested.id), ("replaces", "")),
    ]
    assert made.count_labels() == {"(free answers)": {"unknown": 3}}
    new = {split: read_prepared(tmp_path / "next", "desk", split) for split in ("train", "test")}
    assert new["test"].hash == old["test"].hash
    added = {each.turns: each.answer for each in new["train"].examples[-3:]}
    assert added == {
        (SYSTEM, *LONG): "Block it in the app.",
        (SYSTEM, ("user", "Where do I find my IBAN?")): "In the app.",
        trained.turns: "Better.",
    }
    assert [each.answer for each in new["train"].examples if each.turns == trained.turns] == ["Better."]
    with made.table.open(newline="") as stream:
        first = next(csv.DictReader(stream))
    assert (first["text"], json.loads(first["messages"])[1:]) == ("", as_messages(LONG))
