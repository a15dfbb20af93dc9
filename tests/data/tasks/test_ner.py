"""Entity types: mentions, pairs and both variants."""

from __future__ import annotations

from collections import Counter

import pytest

from finlora.data.tasks.ner import read_ner
from finlora.errors import DatasetError

SENTENCE = "-DOCSTART- -X- O O\n\nOx NNP - I-ORG\nBank NNP - I-ORG\nand CC - O\nAda NNP - I-PER\n. . - O\n\n"
ENGLISH = "In IN - O\nRome NNP - I-LOC\n, , - O\nEnglish JJ - I-MISC\n\n"


def write(folder, train, test=SENTENCE):
    (folder / "FIN5.txt").write_text(train, encoding="utf-8")
    (folder / "FIN3.txt").write_text(test, encoding="utf-8")
    return folder


@pytest.mark.parametrize(("variant", "type_"), [("as_published", "person"), ("corrected", "organization")])
def test_published_type_is_the_last_entitys(tmp_path, ask, variant, type_):
    splits = read_ner(ask(write(tmp_path, SENTENCE), variant))
    assert len(splits.train) == 2 * 17
    assert {item.answer for item in splits.train if "'Ox Bank'" in item.prompt} == {type_}
    assert {item.answer for item in splits.train if "'Ada'" in item.prompt} == {"person"}
    assert splits.train[0].group == "Ox Bank | Ox Bank and Ada ."
    assert any("in 1 of them the published type" in note for note in splits.notes)


def test_what_is_left_out_is_counted(tmp_path, ask):
    splits = read_ner(ask(write(tmp_path, SENTENCE + SENTENCE + ENGLISH)))
    assert len(splits.train) == 2 * 17
    assert any(
        "left out 1 mentions of type MISC, 1 in sentences" in note and "2 mentions" in note for note in splits.notes
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Ox NNP - I-FIRM\n", r"FIN5.txt:1, column tag: found 'I-FIRM', expected one of O, B-PER"),
        ("Ox NNP I-ORG\n", r"FIN5.txt:1, column line: found 'Ox NNP I-ORG', expected four fields"),
        ("-DOCSTART- -X- O O\n\n", "holds no sentence"),
    ],
)
def test_bad_line_names_line_and_column(tmp_path, ask, text, words):
    with pytest.raises(DatasetError, match=words):
        read_ner(ask(write(tmp_path, text)))


def test_hub_pairs_group_by_the_quoted_entity(fake_hub, ask):
    pair = {"instruction": "What type is 'Ada's' here?\nOptions: x", "input": "Ada's mill", "output": "person"}
    fake_hub({"train": [pair], "test": [pair]})
    assert read_ner(ask(None)).test[0].group == "Ada's | Ada's mill"
    with pytest.raises(DatasetError, match="ready-made pairs"):
        read_ner(ask(None, "corrected"))
    fake_hub({"train": [{**pair, "instruction": "What type?"}], "test": [pair]})
    with pytest.raises(DatasetError, match="a question with the entity in single quotes"):
        read_ner(ask(None))


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("variant", "pairs"),
    [
        ("as_published", {"person": 135, "organization": 41, "location": 30}),
        ("corrected", {"person": 124, "organization": 48, "location": 34}),
    ],
)
def test_published_counts_and_labels(shared_data, ask, variant, pairs):
    splits = read_ner(ask(shared_data / "ner", variant))
    assert (len(splits.train), len(splits.test)) == (13_549, 3_502)
    assert Counter(item.label for item in splits.test) == {type_: 17 * number for type_, number in pairs.items()}
    assert any("206 (sentence, entity) pairs; in 55 of them" in note for note in splits.notes)
