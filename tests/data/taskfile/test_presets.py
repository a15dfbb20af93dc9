"""Exports of annotation tools in their published formats; rows that are left out are counted."""

from __future__ import annotations

import pytest
from letters import make_rows

from finlora.errors import DatasetError

TEXTS = [row["text"] for row in make_rows(12)]


def of(splits):
    return {
        item.prompt.partition("\nInput: ")[2].removesuffix("\nAnswer: "): item.label
        for item in (*splits.train, *splits.test)
    }


def studio(text, *choices, cancelled=False):
    result = [{"value": {"choices": list(choices)}, "from_name": "tone", "type": "choices"}]
    return {"id": 1, "data": {"text": text}, "annotations": [{"was_cancelled": cancelled, "result": result}]}


def argilla(text, *pairs):
    responses = {"label": [{"value": value, "status": status} for value, status in pairs]}
    return {"id": "1", "fields": {"text": text}, "responses": responses}


EXPORTS = {
    "label_studio": ("rows.json", [studio(text, "0") for text in TEXTS[:9]] + [studio(TEXTS[9], "1", cancelled=True)]),
    "prodigy": (
        "rows.jsonl",
        [{"text": text, "label": "0", "answer": "accept"} for text in TEXTS[:9]]
        + [{"text": "x y z", "label": "1", "answer": "reject"}],
    ),
    "doccano": ("rows.jsonl", [{"id": 1, "text": text, "label": ["0"]} for text in TEXTS[:9]]),
    "argilla": (
        "rows.json",
        [argilla(text, ("0", "submitted"), ("1", "draft")) for text in TEXTS[:9]]
        + [argilla(TEXTS[9], ("0", "submitted"), ("1", "submitted")), argilla(TEXTS[10], ("0", "discarded"))],
    ),
}


@pytest.mark.parametrize("preset", EXPORTS)
def test_labels_of_an_export(write_rows, read_task, preset):
    name, rows = EXPORTS[preset]
    write_rows(rows, name)
    splits = read_task(preset=preset, source={"files": name})
    assert of(splits) == dict.fromkeys(TEXTS[:9], "bad")
    left_out = [note for note in splits.notes if note.startswith("Left out")]
    assert (
        left_out
        == {
            "label_studio": ["Left out 1 of 10 rows of label_studio: no annotation, or only cancelled ones."],
            "prodigy": ["Left out 1 of 10 rows of prodigy: answer is reject."],
            "doccano": [],
            "argilla": [
                "Left out 1 of 11 rows of argilla: its annotators disagree.",
                "Left out 1 of 11 rows of argilla: no submitted response.",
            ],
        }[preset]
    )


def test_flat_records_of_argilla(write_rows, read_task):
    rows = [
        {"text": text, "label.responses": ["1", "0"], "label.responses.status": ["draft", "submitted"]}
        for text in TEXTS
    ]
    write_rows(rows, "rows.json")
    assert set(of(read_task(preset="argilla", source={"files": "rows.json"})).values()) == {"bad"}


def test_several_labels_of_doccano_are_a_multi_task(write_rows, read_task):
    write_rows([{"text": text, "labels": ["0", "1"][: row % 3]} for row, text in enumerate(TEXTS)], "rows.jsonl")
    splits = read_task(preset="doccano", kind="multi", prompt=None, source={"files": "rows.jsonl"})
    assert len(splits.train) + len(splits.test) == 24


def test_alpaca_is_one_prompt(write_rows, read_task):
    rows = [
        {"instruction": f"Sum up {text}", "input": text if row % 2 else "", "output": "ok"}
        for row, text in enumerate(TEXTS)
    ]
    write_rows(rows, "rows.json")
    splits = read_task(preset="alpaca", kind="text", labels=None, prompt=None, source={"files": "rows.json"})
    prompts = {item.prompt for item in (*splits.train, *splits.test)}
    assert f"Instruction: Sum up {TEXTS[0]}\nAnswer: " in prompts
    assert f"Instruction: Sum up {TEXTS[1]}\nInput: {TEXTS[1]}\nAnswer: " in prompts


@pytest.mark.parametrize("preset", ["sharegpt", "openai"])
def test_conversations_of_both_forms_are_equal(write_rows, read_task, preset):
    keys, names = (
        (("from", "value"), ("human", "gpt")) if preset == "sharegpt" else (("role", "content"), ("user", "assistant"))
    )
    column = "conversations" if preset == "sharegpt" else "messages"
    chats = [[(names[0], text), (names[1], "yes"), (names[0], "sure?"), (names[1], "no")] for text in TEXTS]
    write_rows([{column: [dict(zip(keys, turn, strict=True)) for turn in chat]} for chat in chats], "rows.jsonl")
    splits = read_task(preset=preset, kind="chat", labels=None, prompt=None, source={"files": "rows.jsonl"})
    example = splits.test[0]
    assert example.turns[1:] == (("assistant", "yes"), ("user", "sure?"))
    assert (example.turns[0][1] in TEXTS, example.answer, example.choices) == (True, "no", ())


def test_row_of_another_format_is_refused(write_rows, read_task):
    write_rows(make_rows(3), "rows.json")
    with pytest.raises(
        DatasetError, match=r"rows.json:1: found text, label; preset label_studio needs data and annotations"
    ):
        read_task(preset="label_studio", source={"files": "rows.json"})
    with pytest.raises(DatasetError, match="preset argilla needs responses"):
        read_task(preset="argilla", source={"files": "rows.json"})
