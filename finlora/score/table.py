"""Input table of a scoring as deterministic parts: byte ranges of a text file, row ranges within a Parquet row group.

The same files give the same parts on every machine, so a scored part is never scored again. Each file is read once to find its
parts, check all rows and hash it. Later each part is read by itself: memory holds one part, or one row group.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finlora.data.taskfile.own_tables import find_delimiter, large_fields
from finlora.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa

PART_ROWS = {"cuda": 2048, "cpu": 1024}
"""Rows of a part by device: enough to fill micro-batches, few enough that a crash costs a minute at most."""
FORMATS = {".csv": "csv", ".tsv": "csv", ".jsonl": "jsonl", ".parquet": "parquet"}
Row = Mapping[str, Any]


class Part(NamedTuple):
    """Consecutive rows of one file."""

    number: int
    """Counts over all files, from 0."""
    file: int
    """Index of the file."""
    num_rows: int
    first_row: int
    """Row within the file, from 0."""
    start: int
    """Text: first byte. Parquet: row within the row group."""
    stop: int
    """Text: the byte after the last one. Parquet: index of the row group."""


@dataclass(frozen=True, slots=True)
class TableFile:
    """One file of the table."""

    path: Path
    format: str
    """A value of FORMATS."""
    sha256: str
    columns: tuple[str, ...]
    """For JSON lines: the columns of the first 100 rows."""
    num_rows: int
    delimiter: str = ""
    """CSV only."""


@dataclass(frozen=True, slots=True)
class Table:
    """Files of one format, in the order of their names."""

    root: Path
    """The file, or the folder."""
    files: tuple[TableFile, ...]
    parts: tuple[Part, ...]

    @property
    def format(self) -> str:
        return self.files[0].format

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for file in self.files for name in file.columns))


def open_table(root: Path, part_rows: int) -> Table:
    """Read a file, or all files of a folder, once, and return their parts, hashes and columns.

    Raises:
        DatasetError: there is no table or no row, files differ in format or columns, or a row is malformed.
    """
    paths = find_tables(root)
    files: list[TableFile] = []
    parts: list[Part] = []
    for index, path in enumerate(paths):
        file, own = _scan(path, index, len(parts), part_rows)
        files.append(file)
        parts += own
    if len({file.format for file in files}) > 1:
        found = ", ".join(sorted({file.path.suffix for file in files}))
        raise DatasetError(f"{root} holds files of several formats ({found}): score each format by itself.")
    for file in files[1:]:
        if file.format != "jsonl" and file.columns != files[0].columns:
            raise DatasetError(
                f"{file.path.name} has the columns {', '.join(file.columns)}, and {files[0].path.name} has "
                f"{', '.join(files[0].columns)}: score tables of other columns by themselves."
            )
    if not parts:
        raise DatasetError(f"{root} has no row to score.")
    return Table(root, tuple(files), tuple(parts))


def read_rows(table: Table, part: Part, groups: RowGroups, columns: Sequence[str] | None = None) -> list[Row]:
    """Return the rows of a part.

    Args:
        groups: cache of the last row group.
        columns: columns to read from Parquet; None: all.
    """
    file = table.files[part.file]
    if file.format == "parquet":
        rows: list[Row] = groups.read(file.path, part, columns).to_pylist()
        return rows
    if file.format == "jsonl":
        return [json.loads(line) for line in read_lines(file.path, part)]
    with large_fields():
        lines = (line + "\n" for line in _read_text(file.path, part).split("\n"))
        records = csv.reader(lines, delimiter=file.delimiter, strict=True)
        return [dict(zip(file.columns, record, strict=True)) for record in records if record]


def read_lines(path: Path, part: Part) -> list[str]:
    """Return the lines of a part of a JSON lines file, without empty ones."""
    return [line.strip() for line in _read_text(path, part).split("\n") if line.strip()]


def _read_text(path: Path, part: Part) -> str:
    with path.open("rb") as stream:
        stream.seek(part.start)
        return stream.read(part.stop - part.start).decode("utf-8-sig" if part.start == 0 else "utf-8")


class RowGroups:
    """Cache of the last row group that was read: consecutive parts come from the same one."""

    def __init__(self) -> None:
        self._key: tuple[Path, int, tuple[str, ...] | None] | None = None
        self._table: pa.Table | None = None

    def read(self, path: Path, part: Part, columns: Sequence[str] | None) -> pa.Table:
        """Return the rows of a part."""
        import pyarrow.parquet as pq

        key = path, part.stop, None if columns is None else tuple(columns)
        if key != self._key:
            self._table = None  # before the next one takes its memory
            with pq.ParquetFile(path) as file:
                self._table = file.read_row_group(part.stop, columns=None if columns is None else list(columns))
            self._key = key
        assert self._table is not None
        return self._table.slice(part.start, part.num_rows)


def find_tables(root: Path) -> list[Path]:
    """Return the file, or all tables of a folder, by name.

    Raises:
        DatasetError: there is none.
    """
    if root.is_file():
        paths = [root]
        if root.suffix.lower() not in FORMATS:
            raise DatasetError(
                f"{root.name} is not a table that can be scored: expected a file that ends in {', '.join(FORMATS)}."
            )
    elif root.is_dir():
        paths = sorted(path for path in root.iterdir() if path.is_file() and path.suffix.lower() in FORMATS)
        if not paths:
            raise DatasetError(f"{root} holds no table: expected files that end in {', '.join(FORMATS)}.")
    else:
        raise DatasetError(f"{root} does not exist: expected a table ({', '.join(FORMATS)}), or a folder of tables.")
    return paths


def _scan(path: Path, index: int, first_number: int, part_rows: int) -> tuple[TableFile, list[Part]]:
    form = FORMATS[path.suffix.lower()]
    if form == "parquet":
        return _scan_parquet(path, index, first_number, part_rows)
    delimiter = find_delimiter(path) if form == "csv" else ""
    lines = _Lines(path)
    with lines:
        columns, records = _read_csv(lines, delimiter) if form == "csv" else _read_jsonl(lines)
        parts: list[Part] = []
        start, first_row, num_rows = lines.offset, 0, 0
        for _record in records:
            num_rows += 1
            if num_rows - first_row == part_rows:
                parts.append(Part(first_number + len(parts), index, part_rows, first_row, start, lines.offset))
                start, first_row = lines.offset, num_rows
        if num_rows > first_row:
            parts.append(Part(first_number + len(parts), index, num_rows - first_row, first_row, start, lines.offset))
    return TableFile(path, form, lines.hash.hexdigest(), tuple(columns), num_rows, delimiter), parts


class _Lines:
    """Decoded lines of a text file, with the number of bytes read so far and their hash."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.hash, self.number = path, 0, hashlib.sha256(), 0
        self._stream = path.open("rb")

    def __enter__(self) -> _Lines:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._stream.readline()
        if not line:
            raise StopIteration
        self.number += 1
        self.hash.update(line)
        try:
            text = line.decode("utf-8-sig" if self.offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise DatasetError(
                f"{self.path.name}:{self.number}: the bytes {line[error.start : error.start + 4].hex(' ')} are not UTF-8: save "
                "the file as UTF-8."
            ) from error
        self.offset += len(line)
        return text


def _read_csv(lines: _Lines, delimiter: str) -> tuple[list[str], Iterator[object]]:
    name = lines.path.name
    reader = csv.reader(lines, delimiter=delimiter, strict=True)

    def explain(line: int, error: csv.Error) -> DatasetError:
        return DatasetError(
            f"{name}:{line}: not valid CSV ({error}): double the quotes inside a field, and end lines with LF or CRLF."
        )

    try:
        with large_fields():
            header = next(reader, [])
    except csv.Error as error:
        raise explain(1, error) from error
    repeated = {column for column in header if header.count(column) > 1}
    if not header or repeated:
        what = f"two columns {min(repeated)!r}" if repeated else "no header line"
        raise DatasetError(f"{name}:1: found {what}: expected a line that names each column once.")

    def records() -> Iterator[object]:
        first = lines.number + 1
        try:
            with large_fields():
                for record in reader:
                    if record and len(record) != len(header):
                        raise DatasetError(
                            f"{name}:{first}: found {len(record)} fields, expected {len(header)} ({', '.join(header[:20])}): "
                            f"put quotes around a field that holds {delimiter!r} or a line break."
                        )
                    first = lines.number + 1
                    if record:
                        yield record
        except csv.Error as error:
            raise explain(first, error) from error

    return header, records()


def _read_jsonl(lines: _Lines) -> tuple[list[str], Iterator[object]]:
    """Return the columns, filled in while the first 100 records are read, and the records."""
    columns: list[str] = []

    def records() -> Iterator[object]:
        count = 0
        for line in lines:
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DatasetError(
                    f"{lines.path.name}:{lines.number}: not valid JSON ({error}): expected one object per line."
                ) from error
            if not isinstance(value, dict):
                raise DatasetError(
                    f"{lines.path.name}:{lines.number}: found {type(value).__name__}, expected one object per line."
                )
            count += 1
            if count <= 100:
                columns.extend(key for key in value if key not in columns)
            yield value

    return columns, records()


def _scan_parquet(path: Path, index: int, first_number: int, part_rows: int) -> tuple[TableFile, list[Part]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from finlora.durable import hash_file

    parts: list[Part] = []
    first_row = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            for group in range(file.num_row_groups):
                left, start = file.metadata.row_group(group).num_rows, 0
                while left:
                    num_rows = min(left, part_rows)
                    parts.append(Part(first_number + len(parts), index, num_rows, first_row, start, group))
                    left, start, first_row = left - num_rows, start + num_rows, first_row + num_rows
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path} is not readable Parquet ({error}): write it again.") from error
    repeated = {column for column in columns if columns.count(column) > 1}
    if repeated:
        raise DatasetError(f"{path.name} has two columns {min(repeated)!r}: give each a name of its own.")
    return TableFile(path, "parquet", hash_file(path), columns, first_row), parts
