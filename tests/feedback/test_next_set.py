"""`finlora feedback` from prepared rows and corrections to the next prepared set, and training steps on it."""

from __future__ import annotations

import csv

import pytest
import torch
from correction_rows import letter, write_corrections
from letters import make_rows, prepare_letters

from finlora.config import LoraConfig, ModelConfig
from finlora.data.encode import collate, encode_examples
from finlora.data.sets.prepared import read_prepared
from finlora.data.taskfile.load import read_card
from finlora.data.taskfile.read import make_task
from finlora.model.base import load_base
from finlora.model.lora import attach_lora, trainable_parameters
from finlora.train.steps.loop import AnswerLoss

ROWS = make_rows(
    40,
    customer=lambda row: f"c{row}",
    day=lambda row: f"{2025 if row % 5 else 2026}-03-{1 + row % 28:02}",
)
TEST = [row["text"] for row in ROWS if row["day"].startswith("2026")]
TRAIN = [row for row in ROWS if row["text"] not in TEST]


@pytest.fixture
def data(tmp_path):
    """Prepared letters, split by time; each has a customer of its own."""
    return prepare_letters(
        tmp_path,
        rows=ROWS,
        columns={"time": "day", "group": "customer", "segments": ["customer"]},
        split={"by": "time", "test_from": "2026-01-01", "duplicates": "apart"},
    )


@pytest.fixture
def feedback(call, data, tmp_path):
    """Run `finlora feedback` on rows; returns exit code, standard output on one line, standard error."""

    def run(rows, *more, output="next"):
        path = write_corrections(tmp_path, rows)
        words = ("feedback", path, "--task", "letters", "--data", data, "--output", tmp_path / output, *more)
        code, shown, said = call(*words)
        return code, " ".join(shown.split()), said

    return run


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_corrections_become_training_rows_beside_an_unchanged_test_split(feedback, data, tmp_path):
    wrong = {"0": "good", "1": "bad"}
    right = {"0": "bad", "1": "good"}
    rows = [
        letter(text="A letter about a new matter", label="good", answered="bad", by="A. Analyst", group="c99"),
        letter(text="Another new letter, quite unlike it", label="bad", answered="bad"),
        letter(text="A third one that nobody has seen", label="bad"),
        letter(text="A third one that nobody has seen", label="0"),
        letter(text=TRAIN[0]["text"], label=wrong[TRAIN[0]["label"]], answered=right[TRAIN[0]["label"]]),
        letter(text=TRAIN[1]["text"], label=right[TRAIN[1]["label"]]),
        letter(text=TEST[0], label="bad"),
        letter(text=TEST[1].upper() + " 7", label="bad"),
        letter(text="A letter of a test customer", label="bad", group="c5"),
        letter(task="fpb", text="Profit", label="positive"),
    ]
    code, shown, _ = feedback(rows)
    assert code == 0
    old = {split: read_prepared(data, "letters", split) for split in ("train", "test")}
    new = {split: read_prepared(tmp_path / "next", "letters", split) for split in ("train", "test")}
    assert new["test"].hash == old["test"].hash
    assert (new["train"].card, new["train"].card_hash) == (old["train"].card, old["train"].card_hash)
    render = make_task(read_card(old["train"].card)).form.render
    replaced = render(TRAIN[0]["text"], "")
    kept = [example for example in old["train"].examples if example.prompt != replaced]
    assert new["train"].examples[: len(kept)] == tuple(kept)
    added = new["train"].examples[len(kept) :]
    assert [(each.prompt, each.answer) for each in added] == [
        (render("A letter about a new matter", ""), "good"),
        (render("Another new letter, quite unlike it", ""), "bad"),
        (render("A third one that nobody has seen", ""), "bad"),
        (replaced, wrong[TRAIN[0]["label"]]),
    ]
    assert [each.group for each in added[:2]] == ["c99", "Another new letter, quite unlike it"]
    assert {len(each.segments) for each in added} == {1}
    assert not {each.prompt for each in added} & {each.prompt for each in new["test"].examples}
    for words in (
        "Rows of other tasks, left alone: fpb 1",
        "Dropped: 1 row that an earlier one says already",
        "Left out: corrections.jsonl:7, in test: letters-test-0",
        "Left out: corrections.jsonl:8, near test: letters-test-1",
        "Left out: corrections.jsonl:9, group in test: letters-test-1",
        "In the training rows already: 1",
        "Replaced: 1 training row with another label for the same text",
        f"Next set of {old['train'].hash[:12]} (32 examples): 4 corrections of corrections.jsonl added, 1 example replaced.",
        "Left out 3 corrections, to train on no test text: 1 in test, 1 near test, 1 group in test.",
        "3 corrections without `group`: whether their `customer` is in the test split is unknown",
        "letters is split by time, and corrections may be later than its test split (from 2026-01-01)",
    ):
        assert words in shown, words
    table = rows_of(tmp_path / "next" / "letters.corrections.csv")
    fates = [(row["source"].rpartition(":")[2], row["fate"], row["test_example"]) for row in table]
    assert fates == [
        *(("1", "added", ""), ("2", "added", ""), ("3", "added", ""), ("5", "replaces", ""), ("6", "in train", "")),
        *(("7", "in test", "letters-test-0"), ("8", "near test", "letters-test-1")),
        *(("9", "group in test", "letters-test-1"), ("4", "duplicate", "")),
    ]
    assert table[0]["by"] == "A. Analyst"


def test_output_counts_confirmations_and_corrections_by_label(feedback):
    rows = [
        letter(text=f"A {word} letter of its own", label=label, answered=answered)
        for word, label, answered in (
            *(("first", "bad", "bad"), ("second", "bad", "good"), ("third", "bad", "good")),
            *(("fourth", "good", "good"), ("fifth", "good", "")),
        )
    ]
    _, shown, _ = feedback(rows)
    assert "bad 1 2 0" in shown
    assert "good 1 0 1" in shown


def test_next_corrections_build_on_the_next_set_and_a_dry_run_writes_nothing(feedback, call, data, tmp_path):
    first = [letter(text="A letter about a new matter", label="good")]
    assert "Dry run: nothing was written" in feedback(first, "--dry-run")[1]
    assert not (tmp_path / "next").exists()
    feedback(first)
    path = write_corrections(tmp_path, [letter(text="Yet another letter, later", label="bad")], "later.csv")
    code, shown, _ = call(
        *("feedback", path, "--task", "letters", "--data", tmp_path / "next", "--output", tmp_path / "third")
    )
    assert (code, f"data.dir={tmp_path / 'third'}" in " ".join(shown.split())) == (0, True)
    third = read_prepared(tmp_path / "third", "letters", "train")
    assert third.source == "task file letters.yaml; corrections corrections.jsonl; corrections later.csv"
    assert len(third.examples) == 34


def test_of_kind_multi_a_correction_is_reported_under_its_label(call, tmp_path):
    data = prepare_letters(
        tmp_path, kind="multi", columns={"labels": "label"}, split={"by": "share", "duplicates": "apart"}
    )
    path = write_corrections(tmp_path, [letter(text="A new matter altogether", about="good", label="Yes")])
    code, _, said = call("feedback", path, "--task", "letters", "--data", data, "--output", tmp_path / "next")
    assert code == 0, said
    (added,) = read_prepared(tmp_path / "next", "letters", "train").examples[-1:]
    old = read_prepared(data, "letters", "train").examples
    assert (added.answer, added.segments) == ("Yes", ("good",))
    assert {len(each.segments) for each in old} == {1}


@pytest.mark.parametrize(
    ("rows", "more", "code", "words"),
    [
        ([letter(text=TEST[0])], (), 3, "none of 1 correction of letters changes the training rows: 1 in test."),
        ([letter(label="worse")], (), 3, "label 'worse' is not one of letters"),
        ([letter()], ("--audit", "/absent"), 7, "/absent holds no audit log"),
        ([letter()], ("--data", "/absent"), 3, "Run `finlora prepare --task-file FILE --output /absent` first."),
    ],
)
def test_refusals_write_nothing(feedback, tmp_path, rows, more, code, words):
    found, _, said = feedback(rows, *more)
    assert (found, words in " ".join(said.split())) == (code, True), said
    assert not (tmp_path / "next").exists()


def test_present_set_and_a_missing_table_are_refused(feedback, call, data, tmp_path):
    code, _, said = feedback([letter()], output="data")
    assert (code, "is the folder of the present set, which stays as it is" in " ".join(said.split())) == (2, True)
    code, _, said = call(
        "feedback", tmp_path / "no.csv", "--task", "letters", "--data", data, "--output", tmp_path / "n"
    )
    assert (code, "is not a file: expected a table of corrections" in " ".join(said.split())) == (2, True)


def test_training_steps_on_the_next_set_learn_the_correction(feedback, tiny_base, tmp_path):
    feedback([letter(text="A letter about a new matter", label="good")])
    examples = read_prepared(tmp_path / "next", "letters", "train").examples[-4:]
    base = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 16, torch.device("cpu"), 0)
    net = attach_lora(base.model, LoraConfig(rank=4, dropout=0.0), str(tiny_base), 1).train()
    encoded, _ = encode_examples(list(examples), base.tokenizer, template="raw", max_seq_len=512, too_long="error")
    batch = collate(encoded, base.tokenizer.pad_token_id or 0)
    optimizer = torch.optim.AdamW(trainable_parameters(net).values(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = AnswerLoss(net)(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
