"""Headlines with six and nine questions."""

from __future__ import annotations

import pytest

from finlora.data.tasks.headline import read_headline
from finlora.errors import DatasetError

NINE = (
    "Dates,URL,News,Price or Not,Price Direction Up,Price Direction Constant,Price Direction Down,"
    "PastPrice,FuturePrice,PastNews,FutureNews,Asset Comparision"
)
SIX = (
    "Dates,URL,News,Price Direction Up,Price Direction Constant,Price Direction Down,"
    "Asset Comparision,Past Information,Future Information,Price Sentiment"
)


def write(folder, header, rows):
    path = folder / "gold-dataset-sinha-khandait.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8-sig")
    return folder


@pytest.mark.parametrize(("variant", "answer"), [("as_published", "No"), ("corrected", "Yes")])
def test_price_question_follows_the_variant(tmp_path, ask, variant, answer):
    rows = [f"d,u,tin up {number},1,1,0,0,1,0,0,0,0" for number in range(5)]
    splits = read_headline(ask(write(tmp_path, NINE, rows), variant))
    assert (len(splits.train), len(splits.test)) == (36, 9)
    assert [item.answer for item in splits.test[:4]] == [answer, "Yes", "No", "No"]
    assert any("Price Direction Constant" in note for note in splits.notes)


def test_short_file_asks_six_questions_and_says_so(tmp_path, ask):
    rows = [f'd,u,"tin, {number}",0,0,1,0,1,0,negative' for number in range(5)]
    splits = read_headline(ask(write(tmp_path, SIX, rows)))
    assert (len(splits.train), len(splits.test)) == (24, 6)
    assert any("6 of the paper's 9" in note for note in splits.notes)
    assert not {item.group for item in splits.train} & {item.group for item in splits.test}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("d,u,tin,2,0,0,0,0,0,none", "csv:2, column Price Direction Up: found '2', expected one of 1, 0"),
        ("d,u,,0,0,0,0,0,0,none", "csv:2, column News: found '', expected a text"),
        ("d,u,tin,0", "csv:2, column Price Direction Constant: found 4 fields, expected 10"),
    ],
)
def test_bad_row_names_line_and_column(tmp_path, ask, row, words):
    with pytest.raises(DatasetError, match=words):
        read_headline(ask(write(tmp_path, SIX, [row])))


def test_other_columns_are_an_error(tmp_path, ask):
    with pytest.raises(DatasetError, match="expected News and the nine question columns"):
        read_headline(ask(write(tmp_path, "News,Mood", ["tin,good"])))


def test_hub_pairs_are_kept_and_cannot_be_corrected(fake_hub, ask):
    pair = {"instruction": "Does it talk about price?", "input": "tin up", "output": "Yes"}
    fake_hub({"train": [pair], "test": [pair]})
    assert read_headline(ask(None)).test[0].prompt == (
        "Instruction: Does it talk about price?\nInput: tin up\nAnswer: "
    )
    with pytest.raises(DatasetError, match="ready-made pairs"):
        read_headline(ask(None, "corrected"))


@pytest.mark.shared_data
def test_short_file_counts(shared_data, ask):
    splits = read_headline(ask(shared_data / "headline"))
    assert (len(splits.train), len(splits.test)) == (50_736, 12_684)
    ups = [item for item in (*splits.train, *splits.test) if "price going up?" in item.prompt]
    assert sum(item.answer == "Yes" for item in ups) == 4412
