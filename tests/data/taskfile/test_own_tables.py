"""Tables of every format have the same rows, and a damaged one is refused with its line."""

from __future__ import annotations

import pytest
from letters import make_rows

from finlora.data.taskfile.own_tables import as_text, find_delimiter, find_files, get, read_source, read_table
from finlora.data.taskfile.record import Source
from finlora.errors import DatasetError


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet", "a.arrow"])
def test_every_format_has_the_same_rows(write_rows, name):
    rows = [*make_rows(3), {"text": 'two\nlines, "quoted"', "label": "NA"}]
    found = read_table(write_rows(rows, name))
    assert [dict(fields) for fields, _ in found] == rows
    assert found[0][1] == ("a.csv:2" if name == "a.csv" else "a.tsv:2" if name == "a.tsv" else f"{name}:1")


@pytest.mark.parametrize(
    ("name", "header", "delimiter"),
    [
        ("a.csv", 'id;"text, in, any, language";label', ";"),
        ("a.csv", '"said ""a, b, c"" aloud, twice";label', ";"),
        ("a.csv", '5" pipe;width', ";"),
        ("a.csv", '"text', ","),
        ("a.csv", 'id,"a;b;c"', ","),
        ("a.csv", '"text,\nof, two, lines"|label', "|"),
        ("a.csv", "\n\nid\ttext", "\t"),
        ("a.csv", "text", ","),
        ("a.csv", "id;text\rone,,two;three", ";"),
        ("a.tsv", "a,b,c", "\t"),
    ],
)
def test_delimiter_is_the_most_frequent_one_outside_quotes(tmp_path, name, header, delimiter):
    (tmp_path / name).write_bytes(f"{header}\none,,two\n".encode("utf-8-sig"))
    assert find_delimiter(tmp_path / name) == delimiter


def test_semicolons_of_a_spreadsheet_are_read(tmp_path):
    (tmp_path / "a.csv").write_text("\ufefftext;label\none, two;1\n", encoding="utf-8")
    assert dict(read_table(tmp_path / "a.csv")[0][0]) == {"text": "one, two", "label": "1"}


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", r"a.csv:3: found 1 fields, expected 2 \(a, b\)"),
        ("a.csv", b"a,a\n1,2\n", r"a.csv:1: found two columns 'a'"),
        ("a.csv", b'a,b\n1,"2\n', r"a.csv:2: not valid CSV"),
        ("a.csv", b"a,b\n1,\xe9\n", r"a.csv:2: byte 0xe9 is not UTF-8. Save the table as UTF-8"),
        ("a.csv", b"a,b\n", "holds no row"),
        ("a.jsonl", b'{"a": 1}\n{"a"\n', r"a.jsonl:2: not valid JSON"),
        ("a.jsonl", b"[1]\n", r"a.jsonl:1: found \[1\], expected an object"),
        ("a.json", b'{"a": 1}', "expected a list of objects"),
        ("a.parquet", b"PAR1", "is not readable Parquet"),
        ("a.arrow", b"ARROW1", "is not readable Arrow"),
        ("a.xlsx", b"PK", "expected one of .csv, .tsv"),
    ],
)
def test_damaged_table_is_refused_with_its_line(tmp_path, name, raw, words):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DatasetError, match=words):
        read_table(tmp_path / name)


def test_glob_takes_files_in_order_and_sides_come_from_the_source(write_rows, tmp_path):
    for name in ("b2.csv", "b1.csv", "c.csv"):
        write_rows([{"text": name}], name)
    assert [row.fields["text"] for row in read_source(Source(files="b*.csv"), tmp_path, False)] == ["b1.csv", "b2.csv"]
    rows = read_source(Source(train="b*.csv", test="c.csv"), tmp_path, True)
    assert [row.side for row in rows] == ["train", "train", "test"]
    with pytest.raises(
        DatasetError, match=r"no file is named .*x\*.csv: expected a path or glob.*which holds b1.csv, b2.csv"
    ):
        find_files("x*.csv", tmp_path)


def test_hub_dataset_is_read_at_its_commit_and_offline_refused(fake_hub, monkeypatch, tmp_path):
    source = Source(hub="bank/letters", revision="a" * 40)
    calls = fake_hub({"train": [{"text": "x"}], "test": [{"text": "y"}]})
    assert [(row.side, row.fields["text"]) for row in read_source(source, tmp_path, True)] == [
        ("train", "x"),
        ("test", "y"),
    ]
    assert {options["revision"] for _, options in calls} == {"a" * 40}

    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *_args, **_options: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(
        DatasetError, match="copy the prepared folder here, or download the dataset's files and name them under"
    ):
        read_source(source, tmp_path, False)


def test_values_as_text():
    assert [as_text(value) for value in (1, 1.0, True, "NA", None, float("nan"), 0.5)] == [
        "1",
        "1",
        "true",
        "NA",
        None,
        None,
        "0.5",
    ]
    assert get({"data": {"text": "a"}, "data.text": "b"}, "data.text") == "b"
    assert get({"data": {"text": "a"}}, "data.text") == "a"
    assert get({"data": 3}, "data.text") is None
