"""Output of a scoring: rows and values of the input unchanged, result columns after them, in each format."""

from __future__ import annotations

import csv
import json
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finlora.errors import ConfigError, DatasetError, ResultError
from finlora.score.folder import ScoreFolder
from finlora.score.score_plan import ScoreColumn
from finlora.score.scored_table import check_output, write_output
from finlora.score.table import open_table

COLUMNS = {
    "t_label": ScoreColumn("label", "text"),
    "t_p": ScoreColumn("p", "number"),
    "t_ok": ScoreColumn("ok", "flag"),
}
CELLS = st.text(alphabet=st.sampled_from([*'a",;\t\r\n€ ']), max_size=6)


def write(source, out, part_rows=2):
    """Write an output whose results count the rows; every third row has none."""
    plan = SimpleNamespace(table=open_table(source, part_rows), columns=COLUMNS, prefix="t")
    folder = ScoreFolder(out)
    with folder.locked({}):
        for part in plan.table.parts:
            numbers = range(part.first_row, part.first_row + part.num_rows)
            results = [{} if n % 3 == 2 else {"label": f"n{n}", "p": n / 8, "ok": n % 2 == 0} for n in numbers]
            folder.write_part(part.number, COLUMNS, results)
        write_output(plan, folder)
        folder.finish({"binding": {}})


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=9), suffix=st.sampled_from(["csv", "tsv"]))
def test_csv_keeps_every_value(tmp_path, rows, suffix):
    source, out, mark = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}", "\t" if suffix == "tsv" else ","
    out.unlink(missing_ok=True)
    with source.open("w", newline="") as stream:
        csv.writer(stream, delimiter=mark, quoting=csv.QUOTE_ALL).writerows([("id", "text"), *rows])
    write(source, out)
    with out.open(newline="") as stream:
        found = list(csv.reader(stream, delimiter=mark, strict=True))
    assert found[0] == ["id", "text", *COLUMNS]
    assert [tuple(row[:2]) for row in found[1:]] == rows
    assert [row[2:] for row in found[1:4]] == [
        ["n0", "0.000000", "true"],
        ["n1", "0.125000", "false"],
        ["", "", ""],
    ][: len(rows)]


def test_json_lines_keep_digits_and_order(tmp_path):
    lines = ['{"b": 1.10, "a": {"x": [1e400, null]}}', "{ }", '{"text": "\\u20ac"}']
    (tmp_path / "in.jsonl").write_text("\n".join([*lines[:2], "", lines[2]]))
    write(tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text().splitlines() == [
        '{"b": 1.10, "a": {"x": [1e400, null]}, "t_label": "n0", "t_p": 0.0, "t_ok": true}',
        '{"t_label": "n1", "t_p": 0.125, "t_ok": false}',
        '{"text": "\\u20ac", "t_label": null, "t_p": null, "t_ok": null}',
    ]


def test_parquet_keeps_its_types(tmp_path):
    schema = pa.schema(
        [("id", pa.int32()), ("at", pa.timestamp("us")), ("tags", pa.list_(pa.string())), ("text", pa.large_string())]
    )
    rows = [{"id": n, "at": n, "tags": ["a"] * n, "text": "x" * n} for n in range(5)]
    table = pa.Table.from_pylist(rows, schema)
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=3)
    write(tmp_path / "in.parquet", tmp_path / "out.parquet")
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(schema.names).equals(table)
    assert found.column("t_label").to_pylist() == ["n0", "n1", None, "n3", "n4"]
    assert str(found.schema.field("t_p").type) == "double"


def test_csv_becomes_parquet_of_text(tmp_path):
    (tmp_path / "in.csv").write_text("id,text\n007,NA\n,b\n")
    write(tmp_path / "in.csv", tmp_path / "out.parquet")
    assert pq.read_table(tmp_path / "out.parquet").select(["id", "text"]).to_pylist() == [
        {"id": "007", "text": "NA"},
        {"id": "", "text": "b"},
    ]


def test_folder_becomes_a_folder_and_no_other_file_is_left(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    write(source, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "out.manifest.json"]
    assert json.loads((out / "b.jsonl").read_text())["text"] == "b"


def test_output_is_refused_before_the_input_is_read(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("not a table: its content is not read\n")
    check_output(source, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match=r"out\.csv: expected a name that ends in \.jsonl, as"):
        check_output(source, tmp_path / "out.csv")
    with pytest.raises(ConfigError, match="is the input"):
        check_output(source, source)
    with pytest.raises(ConfigError, match=r"so the output is one too: out\.jsonl names a file"):
        check_output(tmp_path, tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="is inside the input folder"):
        check_output(tmp_path, tmp_path / "out")
    (tmp_path / "there.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"there\.jsonl exists and was not written by `finlora score`"):
        check_output(source, tmp_path / "there.jsonl")
    with pytest.raises(DatasetError, match=r"in\.xlsx does not exist: expected a table"):
        check_output(tmp_path / "in.xlsx", tmp_path / "out.xlsx")
    (tmp_path / "in.csv").write_text("text\n")
    check_output(tmp_path / "in.csv", tmp_path / "out.parquet")


def test_parts_of_another_scoring_are_refused_with_the_difference(tmp_path):
    folder = ScoreFolder(tmp_path / "out.csv")
    with folder.locked({"adapter": "a" * 64, "task": "fpb"}):
        other = ScoreFolder(tmp_path / "out.csv")
        with pytest.raises(ConfigError, match=r"another process scores into .*out\.csv"), other.locked({}):
            pass
    message = rf"parts of another scoring \(adapter {'a' * 16}, now {'b' * 16}\): choose another output"
    with pytest.raises(ConfigError, match=message), folder.locked({"adapter": "b" * 64, "task": "fpb"}):
        pass
    with pytest.raises(ConfigError, match=r"adapter a+, now none\)"), folder.locked({"adapter": None, "task": "fpb"}):
        pass


def test_finished_output_is_recognised_and_a_foreign_one_refused(tmp_path):
    folder = ScoreFolder(tmp_path / "out.csv")
    assert folder.find_finished({"task": "fpb"}) is None
    folder.out.write_text("text\n")
    with pytest.raises(ConfigError, match="was not written by `finlora score`"):
        folder.find_finished({"task": "fpb"})
    folder.parts.mkdir()
    folder.finish({"binding": {"task": "fpb"}, "rows": 0})
    assert folder.find_finished({"task": "fpb"})["rows"] == 0
    with pytest.raises(ConfigError, match=r"was written by another scoring \(task fpb, now tfns\)"):
        folder.find_finished({"task": "tfns"})
    folder.manifest.write_text("{")
    with pytest.raises(ResultError, match="cannot be read"):
        folder.find_finished({"task": "fpb"})


def test_part_that_was_changed_is_refused(tmp_path):
    folder = ScoreFolder(tmp_path / "out.csv")
    with folder.locked({}):
        folder.write_part(0, COLUMNS, [{"label": "a"}])
        with pytest.raises(ResultError, match=r"holds 1 results, expected 2"):
            folder.read_part(0, 2)
        folder.path(0).write_bytes(b"PAR1")
        with pytest.raises(ResultError, match="cannot be read"):
            folder.read_part(0, 1)
