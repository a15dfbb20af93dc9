"""Readers of raw rows from text, CSV and JSON lines files (Arrow: arrow.py); each row knows its file and line.

A reader stops at the first malformed row with a DatasetError that names file, line and column. It skips nothing: a task
counts in its notes what it omits on purpose.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finlora.configfile import is_unicode, show
from finlora.errors import DatasetError

Encoding = Literal["utf-8", "latin-1"]
MAX_RAW_BYTES = 2**30
"""Largest raw file, compressed or not; the largest published one has 30 MB."""

_CONTROL = re.compile(rb"[\x80-\x9f]")
_UTF_8 = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}|[\xf0-\xf4][\x80-\xbf]{3}")
# The replacement character, and multi-byte UTF-8 that was read as Latin-1 or cp1252.
_MISDECODED = re.compile(
    "\ufffd|[\u00c2-\u00df][\u0080-\u00bf]|\u00e2\u20ac|[\u00c2\u00c3][\u0152-\u0192\u02c6-\u2122]"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One raw record: a value for each column, and its source."""

    fields: Mapping[str, Any]
    source: str
    """`file:line`, or `hub-id/split:row` for the hub."""

    def text(self, column: str) -> str:
        """Return a column's text unchanged, white space included.

        Raises:
            DatasetError: the value is not text, is blank, or is not valid Unicode: JSON can hold half of a surrogate pair.
        """
        value = self.fields[column]
        if not isinstance(value, str) or not value.strip():
            raise self.fault(column, value, "a text that is not blank")
        if not is_unicode(value):
            raise self.fault(column, value, "a text in Unicode, without half of a surrogate pair alone")
        return value

    def number(self, column: str) -> float:
        """Return a column's finite number, also from a text."""
        value = self.fields[column]
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise self.fault(column, value, "a number") from None
        if not math.isfinite(number):
            raise self.fault(column, value, "a finite number")
        return number

    def one_of(self, column: str, meanings: Mapping[str, str]) -> str:
        """Return the answer that a raw label encodes.

        Args:
            column: the label's column.
            meanings: raw label, as text, to answer.

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
            "Correct the row in the raw file, or fetch the published file again."
        )


def shorten(value: object) -> str:
    """Return a value for a message, cut to 60 characters."""
    shown = repr(value[:60]) if isinstance(value, str | bytes) else show(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def find_file(source: Path, names: Sequence[str], task: str) -> Path:
    """Return the first of `names` in the folder `source`, or `source` if it is a file.

    Raises:
        DatasetError: there is no such folder, or it has none of the names.
    """
    if source.is_file():
        return source
    if not source.is_dir():
        raise DatasetError(f"{source} does not exist: expected the folder of {task}'s raw files. Correct --source.")
    for name in names:
        if (source / name).is_file():
            return source / name
    found = ", ".join(sorted(path.name for path in source.iterdir())[:8]) or "no file"
    raise DatasetError(
        f"{source} holds {found}: expected {' or '.join(names)} for {task}. Put that file there, or correct --source."
    )


def read_text(path: Path, encoding: Encoding) -> str:
    """Return a file's text without its byte order mark.

    UTF-8 is tried first, whatever the published encoding: its byte sequences do not occur by chance. Latin-1 accepts any byte,
    so the text is searched for signs of another encoding.

    Args:
        path: the file.
        encoding: of the published file.

    Raises:
        DatasetError: the file cannot be read, is empty, or is in another encoding; names line and byte.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_RAW_BYTES + 1)
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error}): expected a readable {encoding} file.") from error
    if len(raw) > MAX_RAW_BYTES:
        raise DatasetError(f"{path} has more than {MAX_RAW_BYTES:,} bytes: expected the file as published.")
    if b"\0" in raw:
        raise _misread(
            path, raw, raw.index(b"\0"), "found a zero byte, which UTF-16 text and binary files have", encoding
        )
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = _decode_latin_1(path, raw) if encoding == "latin-1" else ""
        if not text:
            what = f"byte 0x{raw[error.start]:02x} is not valid utf-8"
            raise _misread(path, raw, error.start, what, encoding) from error
    else:
        if encoding == "latin-1":
            _refuse_misdecoded(path, text)
    if not text.strip():
        raise DatasetError(f"{path} is empty: expected at least one row. Fetch the file again.")
    return text


def _decode_latin_1(path: Path, raw: bytes) -> str:
    """Decode a published Latin-1 file, which has no control characters and no UTF-8 sequences."""
    if found := _UTF_8.search(raw):
        what = f"bytes 0x{found[0].hex()} are utf-8 in a file that is not utf-8 as a whole"
        raise _misread(path, raw, found.start(), what, "latin-1")
    if found := _CONTROL.search(raw):
        what = f"byte 0x{found[0][0]:02x} is a control character in latin-1, a letter or quote in cp1252, cp850 and Mac Roman"
        raise _misread(path, raw, found.start(), what, "latin-1")
    return raw.decode("latin-1")


def _refuse_misdecoded(path: Path, text: str) -> None:
    """Refuse a text that was decoded with the wrong encoding before it was saved as UTF-8; the published file is clean."""
    if found := _MISDECODED.search(text):
        raw = text.encode("utf-8")
        start = len(text[: found.start()].encode("utf-8"))
        what = f"found {found[0]!r}, a character that was decoded with the wrong encoding before the file was saved"
        raise _misread(path, raw, start, what, "latin-1")


def _misread(path: Path, raw: bytes, start: int, what: str, encoding: str) -> DatasetError:
    line = raw.count(b"\n", 0, start) + 1
    return DatasetError(
        f"{path}:{line}: {what} (byte {start:,} of the file). Expected the file as published, in {encoding}: fetch it again "
        "without converting it."
    )


def read_lines(path: Path, encoding: Encoding) -> list[str]:
    """Return the lines of a file without line ends; only `\\n` ends a line, as in an editor.

    Raises:
        DatasetError: as `read_text`, or lines end with a carriage return alone.
    """
    lines = [line.removesuffix("\r") for line in read_text(path, encoding).split("\n")]
    for number, line in enumerate(lines, start=1):
        if "\r" in line:
            raise DatasetError(
                f"{path}:{number}: found a carriage return inside a line, as in old Mac OS files. Expected "
                "the file as published: fetch it again without converting it."
            )
    return lines[:-1] if lines[-1] == "" else lines


def read_csv(
    path: Path,
    encoding: Encoding,
    required: Sequence[str],
    name_columns: Callable[[Sequence[str], str], Sequence[str] | None] | None = None,
) -> list[Row]:
    """Read a CSV with a header line; quoted fields may span lines.

    Args:
        path: the file.
        encoding: of the published file.
        required: columns that must exist, in any order and case; others are kept too.
        name_columns: for files that may lack the header line: gets the first line's fields and source; returns the column names
        if the line is a row, None if it is a header.
    """
    reader = csv.reader(io.StringIO(read_text(path, encoding), newline=""), strict=True)
    rows: list[Row] = []
    header: list[str] = []
    line = 1
    try:
        for values in reader:
            if not header:
                source = f"{path.name}:1"
                _refuse_other_sign(values, source)
                names = name_columns(values, source) if name_columns else None
                header = list(names) if names is not None else _read_header(values, required, source)
                if names is None:
                    line = reader.line_num + 1
                    continue
            if len(values) != len(header):
                column = header[min(len(values), len(header) - 1)]
                raise DatasetError(
                    f"{path.name}:{line}, column {column}: found {len(values)} fields, expected {len(header)} "
                    f"({', '.join(header)}). Quote fields that hold a comma or a line break."
                )
            rows.append(Row(fields=dict(zip(header, values, strict=True)), source=f"{path.name}:{line}"))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DatasetError(
            f"{path.name}:{line}: not valid CSV ({error}). Expected quotes doubled inside and closed at the end."
        ) from error
    return refuse_empty(rows, path.name)


def read_jsonl(path: Path, required: Sequence[str]) -> list[Row]:
    """Read one JSON object per line, in UTF-8."""
    rows = []
    for number, line in enumerate(read_lines(path, "utf-8"), start=1):
        source = f"{path.name}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            what = f"{error.msg} at character {error.colno}" if isinstance(error, json.JSONDecodeError) else None
            raise DatasetError(
                f"{source}: not valid JSON ({what or 'a number or nesting that is too large'}). Expected one object a "
                f"line with {', '.join(required)}: the file may be truncated, so fetch it again."
            ) from error
        if not isinstance(fields, dict):
            raise DatasetError(f"{source}: found {shorten(fields)}, expected an object with {', '.join(required)}.")
        require_columns(list(fields), required, source)
        rows.append(Row(fields=fields, source=source))
    return refuse_empty(rows, path.name)


def _refuse_other_sign(values: Sequence[str], source: str) -> None:
    sign = next((sign for sign in ";\t|" if len(values) == 1 and sign in values[0]), None)
    if sign is not None:
        raise DatasetError(f"{source}: found fields separated by {sign!r}, expected commas. Save the file with commas.")


def _read_header(values: Sequence[str], required: Sequence[str], source: str) -> list[str]:
    """Return the header's names, the required ones in their standard spelling."""
    wanted = {name.casefold(): name for name in required}
    header = [wanted.get(value.strip().casefold(), value) for value in values]
    require_columns(header, required, source)
    repeated = {name for name in header if header.count(name) > 1}
    if repeated:
        raise DatasetError(
            f"{source}: found two columns {min(repeated)!r}, expected one. Check that this is the published file."
        )
    return header


def require_columns(found: Sequence[str], required: Sequence[str], source: str) -> None:
    missing = [column for column in required if column not in found]
    if missing:
        shown = ", ".join(str(column)[:60] for column in found[:20])
        raise DatasetError(
            f"{source}: found columns {shown}, but {', '.join(missing)} is missing. "
            f"Expected {', '.join(required)}: check that this is the published file, with its header line if it has one."
        )


def refuse_empty(rows: list[Row], source: str) -> list[Row]:
    if not rows:
        raise DatasetError(f"{source} has no rows: expected at least one. Fetch the file again.")
    return rows
