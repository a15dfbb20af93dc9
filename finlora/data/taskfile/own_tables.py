"""Readers of a user's own tables: CSV, TSV, JSON, JSON lines, Parquet, Arrow and hub datasets, each row with its file and line.

Every value stays as in the file: a CSV cell is text, so `NA` and `007` are values; a missing JSON value is None.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from finlora.configfile import is_unicode
from finlora.data.raw.hub_rows import load_hub_rows
from finlora.data.raw.rows import MAX_RAW_BYTES, shorten
from finlora.data.taskfile.record import Source
from finlora.errors import DatasetError

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".arrow")
_DELIMITERS = ",;\t|"
_QUOTED = re.compile(r'(?<![^,;\t|\r\n"])"[^"]*(?:"|\Z)')
"""A quoted field, or a part of one between doubled quotes."""
_MAX_FIELD = 2**27
"""Most characters of a CSV field."""
_MAX_HEADER = 2**20
"""Most bytes of a header."""


class TableRow(NamedTuple):
    """One row of a user's table."""

    fields: Mapping[str, Any]
    source: str
    """`file:line` of a text file, `file:row` of any other."""
    side: str
    """`train` or `test` if the source says so; empty: the task's split decides."""


def read_source(source: Source, folder: Path, has_sides: bool) -> list[TableRow]:
    """Read all rows of a task file's source, in the order of files and lines.

    Args:
        folder: of the task file; paths are relative to it.
        has_sides: read the splits train and test of a hub dataset, not train alone.

    Raises:
        DatasetError: there is no such file, its format is unknown, a row is malformed, or there is no row.
    """
    rows: list[TableRow] = []
    if source.hub is not None:
        for split in ("train", "test") if has_sides else ("train",):
            rows += _read_hub(source.hub, split, source.revision or "", split if has_sides else "")
        return rows
    sides = {"train": source.train, "test": source.test} if source.train else {"": source.files}
    for side, pattern in sides.items():
        for path in find_files(pattern or "", folder):
            rows += [TableRow(fields, line, side) for fields, line in read_table(path)]
    return rows


def find_files(pattern: str, folder: Path) -> list[Path]:
    """Return the files that a path or glob names, in the order of their names.

    Raises:
        DatasetError: there is none.
    """
    path = Path(pattern).expanduser()
    whole = (path if path.is_absolute() else folder / path).absolute()
    root = Path(whole.anchor)
    found = [whole] if whole.is_file() else sorted(root.glob(str(whole.relative_to(root))))
    found = [path for path in found if path.is_file()]
    if not found:
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)[:8]) or "no table"
        raise DatasetError(
            f"no file is named {whole}: expected a path or glob from the task file's folder, which holds {there}."
        )
    return found


def read_table(path: Path) -> list[tuple[Mapping[str, Any], str]]:
    """Return the rows of one file, each with its source.

    Raises:
        DatasetError: as `read_source`.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[Mapping[str, Any], str]]]] = {
        ".csv": _read_csv,
        ".tsv": _read_csv,
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".parquet": _read_parquet,
        ".arrow": _read_arrow,
    }
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise DatasetError(f"{path} is not a table that is read: expected one of {', '.join(SUFFIXES)}.")
    if path.stat().st_size > MAX_RAW_BYTES:
        raise DatasetError(f"{path} has more than {MAX_RAW_BYTES:,} bytes: cut it into files and name them by a glob.")
    rows = list(readers[suffix](path))
    if not rows:
        raise DatasetError(f"{path} holds no row: expected at least one below the header.")
    return rows


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{path.name}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save the table as UTF-8; in a spreadsheet choose "
            "`CSV UTF-8`."
        ) from error


def _read_csv(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    text, delimiter = _read_text(path), find_delimiter(path)
    with large_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header: list[str] = []
        line = 1
        try:
            for values in reader:
                if not header:
                    header = _check_header([value.strip() for value in values], path.name)
                elif values:
                    if len(values) != len(header):
                        raise DatasetError(
                            f"{path.name}:{line}: found {len(values)} fields, expected {len(header)} ({', '.join(header[:20])}). "
                            f"Put quotes around a field that holds {delimiter!r} or a line break."
                        )
                    yield dict(zip(header, values, strict=True)), f"{path.name}:{line}"
                line = reader.line_num + 1
        except csv.Error as error:
            raise DatasetError(
                f"{path.name}:{line}: not valid CSV ({error}). Expected quotes doubled inside a field and closed at its end."
            ) from error


def find_delimiter(path: Path) -> str:
    """Return a CSV file's delimiter: a tab in .tsv; else the most frequent of comma, semicolon, tab and bar in the header.

    Delimiters inside quotes do not count.
    """
    if path.suffix.lower() == ".tsv":
        return "\t"
    with path.open("rb") as stream:
        start = stream.read(_MAX_HEADER).decode("utf-8-sig", "replace")
    header = _QUOTED.sub('"', start).lstrip("\r\n").replace("\r", "\n").partition("\n")[0]
    return max(_DELIMITERS, key=header.count)


@contextlib.contextmanager
def large_fields() -> Iterator[None]:
    """Let a field hold a whole document: csv takes 128 KiB by default."""
    before = csv.field_size_limit(_MAX_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _check_header(names: list[str], source: str) -> list[str]:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise DatasetError(f"{source}:1: found two columns {min(repeated)!r}: give each column a name of its own.")
    return names


def _read_jsonl(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            yield _check_object(_parse(line, f"{path.name}:{number}"), f"{path.name}:{number}"), f"{path.name}:{number}"


def _read_json(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    values = _parse(_read_text(path), path.name)
    if not isinstance(values, list):
        raise DatasetError(
            f"{path.name} holds {shorten(values)}: expected a list of objects, or a .jsonl file with one object per line."
        )
    for number, item in enumerate(values, start=1):
        yield _check_object(item, f"{path.name}, item {number}"), f"{path.name}:{number}"


def _parse(text: str, source: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = (
            f"{error.msg} at character {error.colno}"
            if isinstance(error, json.JSONDecodeError)
            else "nested too deeply"
        )
        raise DatasetError(
            f"{source}: not valid JSON ({what}). Expected one object per line; the file may be cut short."
        ) from error


def _check_object(value: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise DatasetError(f"{source}: found {shorten(value)}, expected an object with a value for each column.")
    return value


def _read_parquet(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _check_header(file.schema_arrow.names, path.name)
            number = 0
            for batch in file.iter_batches(batch_size=4096, use_threads=False):
                for fields in batch.to_pylist():
                    number += 1
                    yield fields, f"{path.name}:{number}"
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(
            f"{path} is not readable Parquet, perhaps cut short ({shorten(str(error))}): write it again."
        ) from error


def _read_arrow(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    import pyarrow as pa

    try:
        with pa.OSFile(str(path), "rb") as file:
            is_file = file.read(6) == b"ARROW1"
            file.seek(0)
            table = (pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)).read_all()
            table.validate(full=True)
            _check_header(table.schema.names, path.name)
            for number, fields in enumerate(table.to_pylist(), start=1):
                yield fields, f"{path.name}:{number}"
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DatasetError(
            f"{path} is not readable Arrow, perhaps cut short ({shorten(str(error))}): write it again."
        ) from error


def _read_hub(hub_id: str, split: str, revision: str, side: str) -> list[TableRow]:
    try:
        rows = load_hub_rows(hub_id, split, (), revision=revision)
    except DatasetError as error:
        reason = str(error).partition(" Expected a reachable hub")[0]
        raise DatasetError(
            f"{reason} Run `finlora prepare` where the hub can be reached and copy the prepared folder here, or download the "
            "dataset's files and name them under source.files."
        ) from error
    return [TableRow(row.fields, row.source, side) for row in rows]


def get(fields: Mapping[str, Any], column: str) -> Any:
    """Return a column's value; dots lead into nested objects, unless a column has the whole name. None: it is missing."""
    if column in fields:
        return fields[column]
    value: Any = fields
    for name in column.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def as_text(value: Any) -> str | None:
    """Return a value as text, by which labels and identifiers are compared: 1 and 1.0 are `1`, True is `true`. None: missing.

    Raises:
        TypeError: it is a list or an object.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value if is_unicode(value) else value.encode("utf-8", "replace").decode()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, int | float | Decimal):
        return str(value)
    raise TypeError(shorten(value))


def list_columns(rows: Sequence[TableRow]) -> list[str]:
    """Return the columns of the first rows, in their order."""
    return list(dict.fromkeys(name for row in rows[:100] for name in row.fields))
