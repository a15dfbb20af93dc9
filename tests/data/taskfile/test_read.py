"""Task files of every kind. Three published sets as plain CSV give the built-in tasks' examples."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
from letters import make_rows

from finlora.data.prompts import HEADLINE_QUESTIONS
from finlora.data.sets.catalog import TASKS
from finlora.data.task import Request


def asked(examples):
    """Return the hash of what a model is asked and judged by, without the task's name; the groups; the number of examples."""
    fields = [(item.prompt, item.answer, item.label, item.choices) for item in examples]
    numbers: dict[str, int] = {}
    groups = [numbers.setdefault(item.group, len(numbers)) for item in examples]
    return hashlib.sha256(repr(fields).encode()).hexdigest(), groups, len(examples)


def read_built_in(name, source):
    return TASKS[name].read(Request(source=source, variant="as_published", splits="all"))


@pytest.mark.shared_data
def test_fpb_as_csv_is_the_built_in_task(shared_data, write_rows, read_task):
    lines = (shared_data / "fpb" / "Sentences_50Agree.txt").read_text(encoding="latin-1").splitlines()
    pairs = [line.rpartition("@") for line in lines]
    write_rows([{"sentence": sentence, "tone": label} for sentence, _, label in pairs])
    splits = read_task(
        columns={"text": "sentence", "label": "tone"},
        labels=["negative", "neutral", "positive"],
        prompt={"instruction": "What is the sentiment of this news?"},
        split={"by": "share", "test_share": 0.25, "seed": 42, "duplicates": "apart"},
    )
    published = read_built_in("fpb", shared_data / "fpb")
    assert asked(splits.train) == asked(published.train)
    assert asked(splits.test) == asked(published.test)
    assert any(note.startswith("Warning:") and "equal or nearly equal" in note for note in splits.notes)


@pytest.mark.shared_data
def test_tfns_as_csv_is_the_built_in_task(shared_data, read_task):
    folder = shared_data / "tfns"
    splits = read_task(
        source={"train": str(folder / "sent_train.csv"), "test": str(folder / "sent_valid.csv")},
        labels=[
            {"value": "negative", "from": [0]},
            {"value": "neutral", "from": [2]},
            {"value": "positive", "from": [1]},
        ],
        prompt={"instruction": "What is the sentiment of this tweet?"},
        split={"duplicates": "apart"},
    )
    published = read_built_in("tfns", folder)
    assert asked(splits.train) == asked(published.train)
    assert asked(splits.test) == asked(published.test)


@pytest.mark.shared_data
def test_headline_as_csv_is_the_built_in_task(shared_data, write_rows, read_task):
    """One row per question, as the built-in reader makes them of the published table."""
    published = read_built_in("headline", shared_data / "headline")
    rows = []
    for split in ("train", "test"):
        for item in getattr(published, split)[:1500]:
            question = next(words for words in HEADLINE_QUESTIONS.values() if f": {words} " in item.prompt)
            rows.append({"news": item.group, "question": question, "is_so": "01"[item.answer == "Yes"], "part": split})
    write_rows(rows)
    splits = read_task(
        kind="yes_no",
        columns={"text": "news", "question": "question", "label": "is_so", "group": "news"},
        labels=[{"value": "Yes", "from": ["1"]}, {"value": "No", "from": ["0"]}],
        prompt=None,
        split={"by": "column", "column": "part"},
    )
    assert asked(splits.train) == asked(published.train[:1500])
    assert asked(splits.test) == asked(published.test[:1500])


def test_twenty_labels_with_slashes(write_rows, read_task):
    labels = [f"topic {number}/{number + 1}" for number in range(20)]
    write_rows([{**row, "label": labels[number % 20]} for number, row in enumerate(make_rows(200))])
    splits = read_task(labels=labels)
    assert {len(item.choices) for item in splits.test} == {20}
    assert 'Please choose an answer from: "topic 0/1", "topic 1/2"' in splits.test[0].prompt


def test_prompt_has_system_meanings_and_an_example(write_rows, read_task):
    write_rows(make_rows(10))
    splits = read_task(
        labels=[{"value": "bad", "from": ["0"], "means": "worse off"}, {"value": "good", "from": ["1"]}],
        prompt={"system": "You label.", "instruction": "Tone?", "example": {"text": "A form.", "label": "good"}},
    )
    text = splits.test[0].group
    assert splits.test[0].prompt == (
        "You label.\n\nInstruction: Tone? Please choose an answer from {bad/good}.\nbad: worse off\nInput: A form.\nAnswer: good"
        "\n\n"
        f"Instruction: Tone? Please choose an answer from {{bad/good}}.\nbad: worse off\nInput: {text}\nAnswer: "
    )


def test_multi_asks_each_label_of_a_row(write_rows, read_task):
    write_rows([{**row, "labels": ("0", "0|1", "")[number % 3]} for number, row in enumerate(make_rows(30))])
    splits = read_task(kind="multi", prompt={"instruction": "Is it about {label}?"}, columns={"id": "text"})
    assert len(splits.train) + len(splits.test) == 60
    first, second = splits.train[:2]
    assert (first.group, first.choices) == (second.group, ("Yes", "No"))
    assert "Is it about bad? Please choose an answer from {Yes/No}." in first.prompt
    assert (first.id, second.id) == (f"{first.group}-bad", f"{first.group}-good")
    assert (first.segments, second.segments) == (("bad",), ("good",))  # each label gets its own score
    answers = {(item.group, item.id.rpartition("-")[2]): item.answer for item in (*splits.train, *splits.test)}
    rows = make_rows(30)
    assert [answers[rows[1]["text"], name] for name in ("bad", "good")] == ["Yes", "Yes"]
    assert [answers[rows[2]["text"], name] for name in ("bad", "good")] == ["No", "No"]
    num_bad = sum(item.id.endswith("-bad") and item.answer == "Yes" for item in splits.train)
    assert any(f"Labels of train: bad {num_bad / 24:.1%}" in note for note in splits.notes)


def test_number_asks_its_question_and_names_the_unit(write_rows, read_task):
    rows = [
        {"fragment": row["text"], "ask": "What is the fee?", "fee": f"{number},5"}
        for number, row in enumerate(make_rows(10))
    ]
    write_rows(rows)
    splits = read_task(
        kind="number",
        labels=None,
        prompt=None,
        columns={"text": "fragment", "question": "ask", "answer": "fee"},
        number={"unit": "EUR", "decimals": 2, "decimal_mark": ","},
    )
    item = splits.test[0]
    assert item.prompt.startswith(
        "Instruction: What is the fee? Give only the number, in EUR, rounded to 2 decimals.\nInput: "
    )
    assert item.answer == item.label
    assert item.answer.endswith(".50")


def test_chat_trains_on_the_last_answer_or_each(write_rows, read_task):
    turns = [("user", "a {}"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [
        {"messages": [{"role": role, "content": text.format(row["text"])} for role, text in turns]}
        for row in make_rows(10)
    ]
    write_rows(rows, "chats.jsonl")
    chat = {"kind": "chat", "labels": None, "source": {"files": "chats.jsonl"}, "prompt": {"system": "Be brief."}}
    last, each = read_task(**chat), read_task(**chat, train_on="all_assistant")
    assert (len(last.train) + len(last.test), len(each.train) + len(each.test)) == (10, 20)
    assert [len(item.turns) for item in each.test[:2]] == [2, 4]
    assert each.test[0].group == each.test[1].group
    assert last.test[0].turns[0] == ("system", "Be brief.")
    assert last.test[0].prompt.startswith("system: Be brief.\nuser: a ")


def test_weights_segments_and_times_reach_the_examples(write_rows, read_task):
    rows = make_rows(
        10,
        w=lambda row: row + 0.5,
        desk=lambda row: "NS"[row % 2],
        country=lambda _row: "",
        when=lambda _row: "2024-05-06",
    )
    write_rows(rows)
    splits = read_task(columns={"weight": "w", "segments": ["desk", "country"], "time": "when"})
    by_text = {item.group: item for item in (*splits.train, *splits.test)}
    item = by_text[rows[3]["text"]]
    assert (item.weight, item.segments, item.time) == (3.5, ("S", "(none)"), "2024-05-06T00:00:00")
    assert dataclasses.replace(item, weight=1.0, segments=(), time="") != item
    assert any(note == "Dates: train 2024-05-06 to 2024-05-06, test 2024-05-06 to 2024-05-06." for note in splits.notes)
