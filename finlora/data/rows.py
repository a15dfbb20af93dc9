"""Raw rows from text, CSV and JSON lines files (Arrow: arrow.py): each knows the file and line it came from.

Every reader here stops at the first malformed row with a DatasetError that names file, line and column. Nothing is
skipped: what a task leaves out on purpose, the task counts in its notes.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finlora.configfile import is_unicode, show
from finlora.errors import DatasetError

SplitChoice = Literal["all", "test"]
MAX_RAW_BYTES = 2**30
"""Largest raw file that is read, packed or unpacked: the largest published one has 30 MB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked a task's reader for."""

    source: Path | None
    """Folder (or single file) of raw files. None: the task's dataset on the hub."""
    variant: str
    """One of the task's variants: `as_published` keeps the published defects, `corrected` mends them."""
    splits: SplitChoice
    """`test` reads the test split alone, where the training file cannot be had."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One raw record: a value a column, and where it stands."""

    fields: Mapping[str, Any]
    source: str
    """`file:line`, or `hub-id/split:row` for the hub."""

    def text(self, column: str) -> str:
        """Return a column's text as it stands, white space included.

        Raises:
            DatasetError: the value is not a text, is blank, or is not Unicode: JSON can hold halves of characters.
        """
        value = self.fields[column]
        if not isinstance(value, str) or not value.strip():
            raise self.fault(column, value, "a text that is not blank")
        if not is_unicode(value):
            raise self.fault(column, value, "a text in Unicode, without half of a surrogate pair alone")
        return value

    def number(self, column: str) -> float:
        """Return a column's finite number; texts that spell one are read."""
        value = self.fields[column]
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.fault(column, value, "a number") from None
        if not math.isfinite(number):
            raise self.fault(column, value, "a finite number")
        return number

    def one_of(self, column: str, meanings: Mapping[str, str]) -> str:
        """Return what a raw label means.

        Args:
            column: the label's column.
            meanings: raw label, written as text, to the answer it stands for.

        Raises:
            DatasetError: the label is not among `meanings`.
        """
        value = self.fields[column]
        answer = meanings.get(str(value).strip()) if isinstance(value, str | int | float) else None
        if answer is None:
            raise self.fault(column, value, f"one of {', '.join(meanings)}")
        return answer

    def fault(self, column: str, found: object, expected: str) -> DatasetError:
        """Return the error for a value of this row."""
        return DatasetError(
            f"{self.source}, column {column}: found {shorten(found)}, expected {expected}. "
            "Mend the row in the raw file, or fetch the published file again."
        )


def shorten(value: object) -> str:
    """Return a value as it looks in a message, cut to 60 characters."""
    shown = repr(value[:60]) if isinstance(value, str | bytes) else show(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def find_file(source: Path, names: Sequence[str], task: str) -> Path:
    """Return the first of `names` in the folder `source`; a source that is a file itself is taken as it is.

    Raises:
        DatasetError: there is no such folder, or none of the names is in it.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DatasetError(f"{source} does not exist: expected the folder of {task}'s raw files. Mend --source.")
    for name in names:
        if (source / name).is_file():
            return source / name
    found = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "no file"
    raise DatasetError(
        f"{source} holds {found}: expected {' or '.join(names)} for {task}. Put that file there, or mend --source."
    )


def read_text(path: Path, encoding: str) -> str:
    """Return a file's text; a wrong encoding is an error that names line and byte."""
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_RAW_BYTES + 1)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}): expected a readable {encoding} file.") from error
    if len(raw) > MAX_RAW_BYTES:
        raise DatasetError(f"{path} has more than {MAX_RAW_BYTES:,} bytes: expected the file as published.")
    if b"\0" in raw:  # Latin-1 takes any byte, so this must be looked for
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise DatasetError(
            f"{path}:{line}: found a zero byte, as UTF-16 text and binary files hold. Expected the file as published, in "
            f"{encoding}: fetch it again without converting it."
        )
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not valid {encoding}. Expected the file as published, "
            f"in {encoding}: fetch it again without converting it."
        ) from error
    if not text.strip():
        raise DatasetError(f"{path} is empty: expected at least one row. Fetch the file again.")
    return text


def read_lines(path: Path, encoding: str) -> list[str]:
    """Return the lines of a file without their ends; only `\\n` ends a line, as in an editor's line numbers."""
    lines = [line.removesuffix("\r") for line in read_text(path, encoding).split("\n")]
    return lines[:-1] if lines[-1] == "" else lines


def read_csv(path: Path, encoding: str, required: Sequence[str]) -> list[Row]:
    """Read a CSV with a header line; quoted fields may span lines.

    Args:
        path: the file.
        encoding: `utf-8-sig` also takes a byte order mark.
        required: columns that must be there; others are kept too.
    """
    reader = csv.reader(io.StringIO(read_text(path, encoding), newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if not header:
                header = values
                require_columns(header, required, f"{path.name}:1")
            elif len(values) != len(header):
                column = header[min(len(values), len(header) - 1)]
                raise DatasetError(
                    f"{path.name}:{line}, column {column}: found {len(values)} fields, expected {len(header)} "
                    f"({', '.join(header)}). Quote fields that hold a comma or a line break."
                )
            else:
                rows.append(Row(fields=dict(zip(header, values, strict=True)), source=f"{path.name}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(
            f"{path.name}:{line}: not valid CSV ({error}). Expected quotes doubled inside and closed at the end."
        ) from error
    return refuse_empty(rows, path.name)


def read_jsonl(path: Path, required: Sequence[str]) -> list[Row]:
    """Read one JSON object a line, in UTF-8."""
    rows = []
    for number, line in enumerate(read_lines(path, "utf-8"), start=1):
        place = f"{path.name}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else None
            raise DatasetError(
                f"{place}: not valid JSON ({what or 'a number or nesting of more than it may have'}). Expected one object a "
                f"line with {', '.join(required)}: the file may be cut short, so fetch it again."
            ) from error
        if not isinstance(fields, dict):
            raise DatasetError(f"{place}: found {shorten(fields)}, expected an object with {', '.join(required)}.")
        require_columns(list(fields), required, place)
        rows.append(Row(fields=fields, source=place))
    return refuse_empty(rows, path.name)


def require_columns(found: Sequence[str], required: Sequence[str], place: str) -> None:
    missing = [column for column in required if column not in found]
    if missing:
        shown = ", ".join(str(column)[:60] for column in found[:20])
        raise DatasetError(
            f"{place}: found columns {shown}, but {', '.join(missing)} is missing. "
            f"Expected {', '.join(required)}: check that this is the published file."
        )


def refuse_empty(rows: list[Row], place: str) -> list[Row]:
    if not rows:
        raise DatasetError(f"{place} holds no row: expected at least one. Fetch the file again.")
    return rows
