"""Rows that are not the published set's: refused, or named where the user says that they are his own."""

from __future__ import annotations

import csv
import io
import random

import pytest

from finlora.data.example import Example, Splits
from finlora.data.prompts import SENTIMENTS
from finlora.data.sets.catalog import PUBLISHED, is_papers_test
from finlora.data.sets.origin import compare_published
from finlora.data.sets.prepare import prepare_task
from finlora.errors import DatasetError

FPB = PUBLISHED["fpb"][0]


def make_examples(split, labels, start=0):
    names = [label for label, count in labels.items() for _ in range(count)]
    return tuple(
        Example(
            id=f"fpb-{split}-{number}",
            task="fpb",
            prompt="p",
            answer=label,
            label=label,
            choices=SENTIMENTS,
            source="",
            group="",
        )
        for number, label in enumerate(names, start)
    )


def make_splits(total=None, test=None):
    test = test or FPB.test_labels
    total = total or FPB.labels
    train = {label: count - test[label] for label, count in total.items()}
    return Splits(train=make_examples("train", train), test=make_examples("test", test))


def compare(read, *, task="fpb", variant="as_published", is_of_hub=False, is_own=False):
    return compare_published(task, variant, read, is_of_hub=is_of_hub, is_own=is_own)


def test_other_numbers_are_refused():
    one_less = make_splits({**FPB.labels, "neutral": 2878})
    words = (
        r"fpb: found 3,633 train / 1,212 test examples, the published set has 3,634 train / 1,212 test\. .*--own-data"
    )
    with pytest.raises(DatasetError, match=words):
        compare(one_less)
    (note,) = compare(one_less, is_own=True)
    assert note.startswith("Not the published set: found 3,633 train")
    assert "cannot be compared with the paper's" in note


def test_exchanged_labels_are_refused():
    """As by TFNS's numbers 0 negative, 1 positive, 2 neutral, or in FinLoRA's own file of the TFNS test."""
    swapped = {"negative": 604, "neutral": 1363, "positive": 2879}
    test = {"negative": 145, "neutral": 338, "positive": 729}
    words = r"labels are swapped \(neutral 1,363, positive 2,879\)"
    with pytest.raises(DatasetError, match=words):
        compare(make_splits(swapped, test))
    with pytest.raises(DatasetError, match=r"labels are swapped \(neutral 338, positive 729\)"):
        compare(Splits(train=(), test=make_examples("test", test)))


def test_other_labels_are_refused():
    with pytest.raises(DatasetError, match=r"found negative 604, neutral 2,878, positive 1,364, the published set has"):
        compare(make_splits({"negative": 604, "neutral": 2878, "positive": 1364}))


def test_same_numbers_of_other_texts_are_named():
    (note,) = compare(make_splits())
    assert "its train and test split differs: other texts, or another order of the rows" in note


def test_generated_tasks_and_unknown_tables_are_not_compared():
    assert compare(make_splits(), task="synthetic_sentiment") == ()
    (note,) = compare(make_splits(), task="xbrl_tags", is_of_hub=True)
    assert "FinLoRA does not know the content" in note


@pytest.mark.parametrize(
    ("task", "data_hash", "num_examples", "is_partial", "expected"),
    [
        ("fpb", FPB.test_hash + "0" * 48, 1212, False, True),
        ("fpb", FPB.test_hash + "0" * 48, 100, True, True),
        ("fpb", "0" * 64, 1212, False, False),
        ("fpb", None, 1212, False, False),
        ("headline", "0" * 64, 20_547, False, True),  # the full file was not available: compared by number
        ("headline", "0" * 64, 20_546, False, False),
        ("headline", "0" * 64, 20_547, True, False),
        ("ner", PUBLISHED["ner"][2].test_hash + "0" * 48, 3502, False, False),  # the corrected variant
        ("synthetic_ner", None, 600, False, True),
    ],
)
def test_papers_scores_are_on_the_published_test(task, data_hash, num_examples, is_partial, expected):
    assert is_papers_test(task, data_hash, num_examples, is_partial) is expected


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("task", "folder", "variant", "splits"),
    [
        ("fpb", "fpb", None, "all"),
        ("fiqa", "fiqa_sa", None, "all"),
        ("fiqa_paper", "fiqa_sa", None, "all"),
        ("tfns", "tfns", None, "all"),
        ("nwgi", "nwgi", None, "test"),
        ("headline", "headline", "as_published", "all"),
        ("headline", "headline", "corrected", "all"),
        ("ner", "ner", "as_published", "all"),
        ("ner", "ner", "corrected", "all"),
        ("xbrl_tags", "xbrl", None, "all"),
        ("xbrl_values", "xbrl", None, "test"),
    ],
)
def test_published_files_are_known_by_their_hashes(shared_data, tmp_path, task, folder, variant, splits):
    report = prepare_task(task, shared_data / folder, tmp_path, variant, splits, overwrite=False, dry_run=True)
    assert report.notes[0] == "The published set, by its numbers, labels and hashes."


@pytest.fixture
def fpb_rows(shared_data):
    lines = (shared_data / "fpb" / "Sentences_50Agree.txt").read_text("latin-1").splitlines()
    return [line.rpartition("@") for line in lines]


def write_fpb_csv(folder, rows, header=None, encoding="latin-1", is_reversed=False):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    if header:
        writer.writerow(header)
    for sentence, _, label in rows:
        writer.writerow([sentence, label] if is_reversed else [label, sentence])
    (folder / "all-data.csv").write_bytes(text.getvalue().encode(encoding))
    return folder


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"header": ["Sentiment", "News"]},
        {"header": ["sentence", "label"], "is_reversed": True},
        {"is_reversed": True},
        {"encoding": "utf-8"},
        {"encoding": "utf-8-sig", "header": ["label", "text"]},
    ],
    ids=["no header", "header", "reversed", "no header, reversed", "utf-8", "utf-8 with a mark"],
)
def test_every_honest_csv_of_fpb_is_the_published_set(tmp_path, fpb_rows, form):
    report = prepare_task(
        "fpb", write_fpb_csv(tmp_path, fpb_rows, **form), tmp_path, None, "all", overwrite=False, dry_run=True
    )
    assert report.counts == {"train": 3634, "test": 1212}
    assert report.notes[0] == "The published set, by its numbers, labels and hashes."


@pytest.mark.shared_data
def test_shuffled_fpb_is_named(tmp_path, fpb_rows):
    shuffled = random.Random(1).sample(fpb_rows, len(fpb_rows))
    report = prepare_task(
        "fpb", write_fpb_csv(tmp_path, shuffled), tmp_path, None, "all", overwrite=False, dry_run=True
    )
    assert "its train and test split differs" in report.notes[0]


@pytest.mark.shared_data
def test_tfns_with_exchanged_labels_is_refused(tmp_path, shared_data):
    exchange = {"0": "0", "1": "2", "2": "1"}
    for name in ("sent_train.csv", "sent_valid.csv"):
        with (shared_data / "tfns" / name).open(encoding="utf-8", newline="") as stream:
            header, *rows = csv.reader(stream)
        with (tmp_path / name).open("w", encoding="utf-8", newline="") as stream:
            csv.writer(stream).writerows([header, *([text, exchange[label]] for text, label in rows)])
    with pytest.raises(DatasetError, match=r"labels are swapped \(neutral 2,398, positive 7,744\)"):
        prepare_task("tfns", tmp_path, tmp_path, None, "all", overwrite=False, dry_run=True)
