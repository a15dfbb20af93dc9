"""Readers of FPB, FiQA, TFNS and NWGI: invented rows for the rules, the reference data for the counts."""

from __future__ import annotations

import json
from collections import Counter

import pyarrow as pa
import pytest

from finlora.data.prompts import seven_sentiment_prompt
from finlora.data.tasks import sentiment
from finlora.errors import DatasetError


def write_fpb(folder, text, encoding="latin-1"):
    (folder / "Sentences_50Agree.txt").write_bytes(text.encode(encoding))
    return folder


def write_fiqa(folder, as_stream=True):
    def row(sentence, score, form="post", label=0):
        return {"sentence": sentence, "sentiment_score": score, "format": form, "label": label}

    parts = {
        "train": [row("a", 0.1), row("b", 0.0999, label=1), row("c", -0.1, "headline", 1), row("d", -0.1001, label=0)],
        "validation": [row("a", 0.1)],
        "test": [row("e", 0.9, "headline")],
    }
    for part, rows in parts.items():
        table = pa.Table.from_pylist(rows)
        opener = pa.ipc.new_stream if as_stream else pa.ipc.new_file
        with pa.OSFile(str(folder / f"fiqa-2018.{part}.arrow"), "wb") as file, opener(file, table.schema) as writer:
            writer.write_table(table)
    return folder


def write_nwgi(path, rows):
    lines = [json.dumps({"context": seven_sentiment_prompt(news), "target": label}) for news, label in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_fpb_splits_on_the_last_at_sign(tmp_path, ask):
    lines = "\n".join(f"Mail info{n}@äbo.example for news .@neutral" for n in range(4)) + "\n"
    splits = sentiment.read_fpb(ask(write_fpb(tmp_path, lines)))
    assert (len(splits.train), len(splits.test)) == (3, 1)
    assert all("@äbo.example" in item.prompt and item.label == "neutral" for item in splits.train)
    assert splits.test[0].id == "fpb-test-0"
    assert splits.test[0].source.startswith("Sentences_50Agree.txt:")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("No mark at all", r"txt:2, column line: found 'No mark at all', expected `sentence@label`"),
        ("Fine .@good", r"txt:2, column label: found 'good', expected one of negative, neutral, positive"),
        (" @neutral", r"txt:2, column sentence: found ' ', expected a text that is not blank"),
        ("", r"txt:2, column line: found '', expected `sentence@label`"),
    ],
)
def test_fpb_bad_row_names_line_and_column(tmp_path, ask, line, words):
    text = f"One .@neutral\n{line}\nTwo .@neutral\nThree .@positive\n"
    with pytest.raises(DatasetError, match=words):
        sentiment.read_fpb(ask(write_fpb(tmp_path, text)))


def test_fpb_reads_the_csv_copy(tmp_path, ask):
    (tmp_path / "all-data.csv").write_text(
        'Sentiment,News\npositive,"Up, at last ."\nneutral,B\nneutral,C\n', "latin-1"
    )
    splits = sentiment.read_fpb(ask(tmp_path))
    assert len(splits.train) + len(splits.test) == 3


@pytest.mark.parametrize(
    ("body", "num_rows"),
    [
        ("positive,Up\nneutral,B\nneutral,C\n", 3),
        ("Up,positive\nB,neutral\nC,neutral\n", 3),
        ("2,Up\n1,B\n0,C\n", 3),
        ("text,label\nB,neutral\nUp,positive\nC,neutral\n", 3),
        ("Sentiment,\nneutral,B\npositive,Up\n", 2),
    ],
    ids=["no header", "no header, reversed", "numbers", "reversed", "one column named"],
)
def test_fpb_csv_with_and_without_a_header(tmp_path, ask, body, num_rows):
    (tmp_path / "all-data.csv").write_text(body)
    splits = sentiment.read_fpb(ask(tmp_path))
    found = {item.prompt.partition("Input: ")[2][:2].strip(): item.label for item in (*splits.train, *splits.test)}
    assert len(found) == num_rows
    assert (found["Up"], found["B"]) == ("positive", "neutral")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("positive,Up, at last\n", "csv:1: found 3 columns .'positive', 'Up', ' at last'., expected two"),
        (",Sentiment,News\n0,neutral,B\n", "csv:1: found 3 columns"),
        ("neutral;B\n", "csv:1: found fields separated by ';'"),
        (
            "Sentiment,News\nneutral,B\nSentiment,News\n",
            "csv:3, column Sentiment|csv:3, column label: found 'Sentiment'",
        ),
        ("a,b\nc,d\n", "csv:2, column label: found 'd', expected one of negative"),
    ],
)
def test_fpb_csv_of_another_form_is_refused(tmp_path, ask, body, words):
    (tmp_path / "all-data.csv").write_text(body)
    with pytest.raises(DatasetError, match=words):
        sentiment.read_fpb(ask(tmp_path))


def test_fpb_saved_as_utf8_is_the_same(tmp_path, ask):
    text = "Yhtiö kasvoi @ 5 % .@positive\nÅland .@neutral\nB .@neutral\n"
    first = sentiment.read_fpb(ask(write_fpb(tmp_path, text)))
    for encoding in ("utf-8", "utf-8-sig"):
        assert sentiment.read_fpb(ask(write_fpb(tmp_path, text, encoding))) == first


def test_fpb_missing_file_says_what_was_expected(tmp_path, ask):
    with pytest.raises(DatasetError, match=r"holds no file: expected Sentences_50Agree.txt or all-data.csv"):
        sentiment.read_fpb(ask(tmp_path))
    with pytest.raises(DatasetError, match="does not exist: expected the folder"):
        sentiment.read_fpb(ask(tmp_path / "nowhere"))


def test_fpb_empty_file_is_an_error(tmp_path, ask):
    with pytest.raises(DatasetError, match="is empty"):
        sentiment.read_fpb(ask(write_fpb(tmp_path, "\n")))


@pytest.mark.parametrize("as_stream", [True, False])
def test_fiqa_folds_scores_and_names_posts(tmp_path, ask, as_stream):
    splits = sentiment.read_fiqa(ask(write_fiqa(tmp_path, as_stream)))
    assert [item.label for item in splits.train] == ["positive", "neutral", "neutral", "negative"]
    assert ["tweet" in item.prompt for item in splits.train] == [True, True, False, True]
    assert any("differs on 1 row." in note for note in splits.notes)


def test_fiqa_score_of_another_scale_is_an_error(tmp_path, ask):
    write_fiqa(tmp_path)
    table = pa.Table.from_pylist([{"sentence": "a", "sentiment_score": 55.0, "format": "post", "label": 0}])
    with pa.OSFile(str(tmp_path / "fiqa-2018.test.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as out:
        out.write_table(table)
    with pytest.raises(
        DatasetError, match=r"arrow:1, column sentiment_score: found 55.0, expected a score from -1 to 1"
    ):
        sentiment.read_fiqa(ask(tmp_path))


def test_fiqa_cut_short_file_is_an_error(tmp_path, ask):
    path = write_fiqa(tmp_path) / "fiqa-2018.test.arrow"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match="not an Arrow stream or file"):
        sentiment.read_fiqa(ask(tmp_path))


def test_tfns_reads_fields_over_several_lines(tmp_path, ask):
    (tmp_path / "sent_train.csv").write_text('text,label\r\n"$AA up\n\nsays ""Ada""",1\r\nflat,2\r\n', newline="")
    (tmp_path / "sent_valid.csv").write_text("text,label\r\n$BB down,0\r\n", newline="")
    splits = sentiment.read_tfns(ask(tmp_path))
    assert [item.label for item in splits.train] == ["positive", "neutral"]
    assert 'up\n\nsays "Ada"' in splits.train[0].prompt
    assert [item.source for item in splits.train] == ["sent_train.csv:2", "sent_train.csv:5"]
    assert splits.test[0].label == "negative"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("text,label\nfine,1\nodd,3\n", r"sent_train.csv:3, column label: found '3', expected one of 0, 1, 2"),
        ("text,label\na,b,1\n", r"sent_train.csv:2, column label: found 3 fields, expected 2"),
        ('text,label\n"open,1\n', r"sent_train.csv:2: not valid CSV"),
        ("tweet,label\na,1\n", r"found columns tweet, label, but text is missing"),
        ("text,label\n", r"has no rows"),
    ],
)
def test_tfns_bad_file_is_an_error(tmp_path, ask, body, words):
    (tmp_path / "sent_train.csv").write_text(body)
    with pytest.raises(DatasetError, match=words):
        sentiment.read_tfns(ask(tmp_path))


def test_tfns_wrong_encoding_names_line_and_byte(tmp_path, ask):
    (tmp_path / "sent_train.csv").write_bytes(b"text,label\nfine,1\ncaf\xe9,1\n")
    with pytest.raises(DatasetError, match=r"sent_train.csv:3: byte 0xe9 is not valid utf-8"):
        sentiment.read_tfns(ask(tmp_path))


def test_utf16_is_named_where_latin1_would_take_any_byte(tmp_path, ask):
    (tmp_path / "Sentences_50Agree.txt").write_text("Profit rose .@positive\n", encoding="utf-16")
    with pytest.raises(
        DatasetError, match=r"Sentences_50Agree.txt:1: found a zero byte, which UTF-16 text and binary files"
    ):
        sentiment.read_fpb(ask(tmp_path))


def test_nwgi_answers_seven_grades_and_folds_the_label(tmp_path, ask):
    write_nwgi(tmp_path / "nwgi_train.jsonl", [("Ups .", "mildly positive")])
    write_nwgi(tmp_path / "nwgi_test.jsonl", [("Downs .", "strong negative"), ("So .", "neutral")])
    splits = sentiment.read_nwgi(ask(tmp_path))
    assert [(item.answer, item.label) for item in splits.test] == [
        ("strong negative", "negative"),
        ("neutral", "neutral"),
    ]
    assert len(splits.train[0].choices) == 7


def test_nwgi_without_train_says_how_to_prepare_the_test_alone(tmp_path, ask):
    write_nwgi(tmp_path / "finlora_nwgi_test.jsonl", [("Downs .", "neutral")])
    with pytest.raises(DatasetError, match=r"expected finlora_nwgi_train.jsonl .* choose --splits test"):
        sentiment.read_nwgi(ask(tmp_path))
    assert sentiment.read_nwgi(ask(tmp_path, splits="test")).train == ()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"context": "x"', "not valid JSON"),
        ("[1]", "expected an object with context, target"),
        ('{"context": "x"}', "target is missing"),
        ('{"context": "Instruction: other\\nInput: x\\nAnswer: ", "target": "neutral"}', "column context"),
    ],
)
def test_nwgi_bad_line_is_an_error(tmp_path, ask, line, words):
    (tmp_path / "nwgi_test.jsonl").write_text(line + "\n")
    with pytest.raises(DatasetError, match=words):
        sentiment.read_nwgi(ask(tmp_path, splits="test"))


def test_hub_rows_make_the_same_examples(fake_hub, ask):
    rows = [{"sentence": f"S{n} .", "label": n % 3} for n in range(8)]
    calls = fake_hub({"train": rows})
    splits = sentiment.read_fpb(ask(None))
    assert (len(splits.train), len(splits.test)) == (6, 2)
    assert {item.label for item in splits.train} <= {"negative", "neutral", "positive"}
    assert calls[0][0] == "takala/financial_phrasebank"
    assert "trust_remote_code" not in calls[0][1]


def test_hub_tfns_and_nwgi_rows_are_read(fake_hub, ask):
    fake_hub({"train": [{"text": "up", "label": 1}], "validation": [{"text": "down", "label": 0}]})
    assert sentiment.read_tfns(ask(None)).test[0].label == "negative"
    fake_hub({"train": [{"news": "n", "label": "neutral"}], "test": [{"news": "m", "label": "strong positive"}]})
    assert sentiment.read_nwgi(ask(None)).test[0].label == "positive"


def test_unreachable_hub_says_to_pass_a_source(monkeypatch, ask):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DatasetError, match=r"could not be loaded from the hub: ConnectionError: no route.*--source"):
        sentiment.read_fpb(ask(None))


def test_hub_table_of_other_columns_is_an_error(fake_hub, ask):
    fake_hub({"train": [{"words": "x"}]})
    with pytest.raises(DatasetError, match="found columns words, expected text, label"):
        sentiment.read_tfns(ask(None))


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("read", "folder", "counts", "labels"),
    [
        (sentiment.read_fpb, "fpb", (3634, 1212), {"neutral": 729, "positive": 338, "negative": 145}),
        (sentiment.read_fiqa, "fiqa_sa", (961, 150), {"positive": 51, "negative": 50, "neutral": 49}),
        (sentiment.read_fiqa_paper, "fiqa_sa", (938, 275), {"positive": 166, "negative": 88, "neutral": 21}),
        (sentiment.read_tfns, "tfns", (9543, 2388), {"neutral": 1566, "positive": 475, "negative": 347}),
    ],
)
def test_published_counts_and_labels(shared_data, ask, read, folder, counts, labels):
    splits = read(ask(shared_data / folder))
    assert (len(splits.train), len(splits.test)) == counts
    assert Counter(item.label for item in splits.test) == labels


@pytest.mark.shared_data
def test_nwgi_published_test_counts(shared_data, ask):
    test = sentiment.read_nwgi(ask(shared_data / "nwgi", splits="test")).test
    assert Counter(item.label for item in test) == {"positive": 2214, "negative": 1342, "neutral": 491}
    assert Counter(item.answer for item in test)["moderately positive"] == 1522


@pytest.mark.shared_data
@pytest.mark.parametrize(("read", "leaks"), [(sentiment.read_fiqa, 0), (sentiment.read_fiqa_paper, 36)])
def test_fiqa_leaks_as_published(shared_data, ask, read, leaks):
    splits = read(ask(shared_data / "fiqa_sa"))
    train = {item.group for item in splits.train}
    assert sum(item.group in train for item in splits.test) == leaks
