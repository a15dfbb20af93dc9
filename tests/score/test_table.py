"""Parts of a table: of any size, together they are its rows in order; malformed files are refused."""

from __future__ import annotations

import csv
import io
import json
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finlora.durable import hash_file
from finlora.errors import DatasetError
from finlora.score.table import RowGroups, open_table, read_rows

# Characters that break readers of text files: quotes, separators, all line ends, and some outside ASCII.
CELLS = st.text(alphabet=st.sampled_from([*'ab",;\t\r\n|€𝄞 \u2028']), max_size=8)
ROWS = st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=40)


def all_rows(table):
    groups = RowGroups()
    return [row for part in table.parts for row in read_rows(table, part, groups)]


def check_parts(table, expected, part_rows):
    assert all_rows(table) == expected
    assert table.num_rows == len(expected)
    assert [part.number for part in table.parts] == list(range(len(table.parts)))
    assert all(1 <= part.num_rows <= part_rows for part in table.parts)
    assert all(later.first_row == part.first_row + part.num_rows for part, later in pairwise(table.parts))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, part_rows=st.integers(1, 9), delimiter=st.sampled_from(",;\t"), ends=st.sampled_from(["\n", "\r\n"]))
def test_parts_of_csv_are_its_rows(tmp_path, rows, part_rows, delimiter, ends):
    stream = io.StringIO()
    # The writer does not quote a lone carriage return.
    quoting = csv.QUOTE_ALL if any("\r" in cell for row in rows for cell in row) else csv.QUOTE_MINIMAL
    writer = csv.writer(stream, delimiter=delimiter, lineterminator=ends, quoting=quoting)
    writer.writerows([("id", "text"), *rows])
    path = tmp_path / "table.csv"
    path.write_bytes(("\ufeff" + stream.getvalue()).encode())
    table = open_table(path, part_rows)
    check_parts(table, [{"id": one, "text": other} for one, other in rows], part_rows)
    assert table.files[0].sha256 == hash_file(path)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, part_rows=st.integers(1, 9))
def test_parts_of_json_lines_are_its_rows(tmp_path, rows, part_rows):
    values = [{"id": one, "nested": {"text": other, "list": [1, None]}} for one, other in rows]
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))
    check_parts(open_table(path, part_rows), values, part_rows)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, part_rows=st.integers(1, 9), group=st.integers(1, 12))
def test_parts_of_parquet_are_its_rows(tmp_path, rows, part_rows, group):
    path = tmp_path / "table.parquet"
    values = [{"id": number, "text": text} for number, (text, _) in enumerate(rows)]
    pq.write_table(pa.Table.from_pylist(values), path, row_group_size=group)
    check_parts(open_table(path, part_rows), values, part_rows)


def test_folder_is_its_files_by_name(tmp_path):
    for name, word in (("b.csv", "later"), ("a.csv", "first")):
        (tmp_path / name).write_text(f"text\n{word}\n")
    (tmp_path / "README.md").write_text("not a table")
    table = open_table(tmp_path, 8)
    assert [row["text"] for row in all_rows(table)] == ["first", "later"]
    assert [part.file for part in table.parts] == [0, 1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"id,text\n1,a\n2\n", r"t\.csv:3: found 1 fields, expected 2 \(id, text\): put quotes"),
        ("t.csv", b'id,text\n1,"a\n', r"t\.csv:2: not valid CSV"),
        ("t.csv", b'"id,text\n1,a\n', r"t\.csv:1: not valid CSV .*: double the quotes"),
        ("t.csv", b"id,text\r1,a\r", r"t\.csv:1: not valid CSV .* and end lines with LF or CRLF"),
        ("t.csv", b"text,text\na,b\n", r"t\.csv:1: found two columns 'text'"),
        ("t.csv", b"", r"t\.csv:1: found no header line"),
        ("t.csv", b"text\n", r"has no row to score"),
        ("t.csv", b"text\nM\xfcnchen\n", r"t\.csv:2: the bytes fc 6e 63 68 are not UTF-8: save the file as UTF-8"),
        ("t.jsonl", b'{"text": "a"}\n["b"]\n', r"t\.jsonl:2: found list, expected one object per line"),
        ("t.jsonl", b'{"text": "a"\n', r"t\.jsonl:1: not valid JSON"),
        ("t.parquet", b"PAR1", r"t\.parquet is not readable Parquet"),
        ("t.xlsx", b"", r"t\.xlsx is not a table that can be scored: expected a file that ends in \.csv"),
    ],
)
def test_malformed_file_is_refused_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        open_table(tmp_path / name, 8)


def test_folder_that_is_not_a_table_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="does not exist"):
        open_table(tmp_path / "no", 8)
    with pytest.raises(DatasetError, match="holds no table"):
        open_table(tmp_path, 8)
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "b.csv").write_text("words\nb\n")
    with pytest.raises(DatasetError, match=r"b\.csv has the columns words, and a\.csv has text"):
        open_table(tmp_path, 8)
    (tmp_path / "b.csv").rename(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(DatasetError, match=r"several formats \(\.csv, \.jsonl\)"):
        open_table(tmp_path, 8)
