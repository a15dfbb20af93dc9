"""Checked rows of a task file: labels mapped, numbers and dates parsed, conversations as turns."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

from finlora.data.raw.rows import shorten
from finlora.data.taskfile.own_tables import TableRow, as_text, get
from finlora.data.taskfile.record import TaskFile
from finlora.data.taskfile.turns import Turn, join_user_turns, read_turns
from finlora.errors import ConfigError, DatasetError, counted

NO_SEGMENT = "(none)"
_AMBIGUOUS_DAY = re.compile(r"\s*(\d{1,2})([./-])(\d{1,2})\2(\d{4}|\d{2})\b")
_MAX_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One row. It becomes one example, or several for kinds multi and chat."""

    source: str
    """`file:line` of the row."""
    id: str | None
    text: str
    about: str
    """The row's question; empty if the task asks the same of each text."""
    answer: str
    """Declared label, number or text; the joined labels for kind multi; empty for kind chat."""
    labels: frozenset[str] = frozenset()
    """Kind multi: the row's labels."""
    turns: tuple[Turn, ...] = ()
    """Kind chat: the conversation, with the task's system message if it has none of its own."""
    group: str | None = None
    time: datetime | None = None
    weight: float = 1.0
    segments: tuple[str, ...] = ()
    side: str = ""
    """`train` or `test` if the data says so, else empty."""


def make_items(task: TaskFile, rows: Sequence[TableRow], notes: list[str]) -> list[Item]:
    """Return an item for each row, in order. With `unlabelled: skip`, rows without a declared label are left out, with a note;
    with `textless: skip`, rows without a text.

    Raises:
        ConfigError: a column is missing; suggests similar names.
        DatasetError: labels are not declared (with their numbers of rows), an identifier repeats, or a value is empty or is not
            the number, date or conversation it should be (its first row).
    """
    _require_columns(task, rows)
    reader = _Reader(task)
    items = [item for row in rows if (item := reader.read(row)) is not None]
    reader.raise_faults(len(rows))
    notes += reader.list_notes(len(rows))
    if not items:
        raise DatasetError(f"{task.name}: none of {len(rows):,} rows has a text and a declared label.")
    if task.columns.id is not None:
        _require_unique([item.id or "" for item in items], task.columns.id)
    return items


def list_needed(task: TaskFile) -> dict[str, str]:
    """Return the columns that the task reads: key in the task file -> name in the data."""
    columns = task.columns
    own = {
        "choice": ("text", "label"),
        "yes_no": ("text", "question", "label"),
        "multi": ("text", "labels"),
        "number": ("text", "question", "answer"),
        "text": ("text", "answer"),
        "chat": ("messages",),
    }[task.kind]
    names = {f"columns.{key}": getattr(columns, key) for key in (*own, "id", "group", "time", "weight")}
    names |= {f"columns.segments[{index}]": name for index, name in enumerate(columns.segments)}
    if task.split_by == "column":
        names["split.column"] = task.split.column
    return {key: name for key, name in names.items() if name is not None}


def _require_columns(task: TaskFile, rows: Sequence[TableRow]) -> None:
    there = list(dict.fromkeys(name for row in rows for name in row.fields))
    faults = []
    for key, name in list_needed(task).items():
        if name in there or any(get(row.fields, name) is not None for row in rows):
            continue
        near = difflib.get_close_matches(name.casefold(), [column.casefold() for column in there], n=2, cutoff=0.5)
        meant = [column for column in there if column.casefold() in near]
        found = ", ".join(there[:20])
        hint = (
            f"did you mean {' or '.join(meant)}?" if meant else f"name the right one under `{key.partition('[')[0]}`."
        )
        if key == "columns.messages" and "conversations" in there:
            hint = "use preset: sharegpt, which reads `conversations`."
        faults.append(
            f"{key} is {name!r}, a column that {rows[0].source.rpartition(':')[0]} does not have: found {found}; {hint}"
        )
    if faults:
        raise ConfigError(faults)


def _require_unique(ids: Sequence[str], column: str) -> None:
    repeated = {value: count for value, count in Counter(ids).items() if count > 1}
    if repeated:
        shown = ", ".join(f"{value!r} {count} times" for value, count in list(repeated.items())[:_MAX_SHOWN])
        raise DatasetError(
            f"{column} repeats {sum(repeated.values()) - len(repeated):,} times ({shown}): expected each identifier once. Take "
            "the repeated rows out, or leave columns.id out: rows are then numbered."
        )


class _Reader:
    def __init__(self, task: TaskFile) -> None:
        self._task = task
        self._meanings = {text: label.value for label in task.labels for text in (label.value, *label.from_)}
        self._unknown: Counter[str] = Counter()
        self._empty: list[str] = []
        self._textless: list[str] = []

    def read(self, row: TableRow) -> Item | None:
        """Return the item of a row. None: it has no text or no declared label, and is counted."""
        task, columns = self._task, self._task.columns
        turns: tuple[Turn, ...] = ()
        if task.is_chat:
            turns = read_turns(task, get(row.fields, columns.messages), row.source)
            text = join_user_turns(turns)
        else:
            if not (self._value(row, columns.text) or "").strip():
                self._textless.append(row.source)
                return None
            text = self._text(row, columns.text)
        about = self._text(row, columns.question) if columns.question else ""
        labels: frozenset[str] = frozenset()
        answer: str | None = ""
        if task.kind in ("choice", "yes_no"):
            answer = self._label(row)
        elif task.kind == "multi":
            found = self._labels(row)
            labels, answer = found or frozenset(), None if found is None else "|".join(sorted(found))
        elif task.kind == "number":
            answer = read_number(task, get(row.fields, columns.answer), row.source)
        elif task.kind == "text":
            answer = self._text(row, columns.answer)
        if answer is None:
            return None
        time = columns.time and read_time(get(row.fields, columns.time), task.time_format, row.source, columns.time)
        return Item(
            source=row.source,
            id=self._text(row, columns.id) if columns.id else None,
            text=text,
            about=about,
            answer=answer,
            labels=labels,
            turns=turns,
            group=self._text(row, columns.group) if columns.group else None,
            time=time or None,
            weight=_read_weight(row, columns.weight) if columns.weight else 1.0,
            segments=tuple(make_printable(self._value(row, name) or NO_SEGMENT) for name in columns.segments),
            side=self._side(row),
        )

    def raise_faults(self, num_rows: int) -> None:
        if self._textless and self._task.textless == "error":
            shown = ", ".join(source.rpartition(":")[2] for source in self._textless[:_MAX_SHOWN])
            more = ", ..." if len(self._textless) > _MAX_SHOWN else ""
            raise DatasetError(
                f"{self._textless[0]}: column {self._task.columns.text} is empty, as in {len(self._textless):,} of {num_rows:,} "
                f"rows ({shown}{more}). Fill it in, or set textless: skip to leave these rows out."
            )
        if self._task.unlabelled == "skip":
            return
        if self._unknown:
            ranked = self._unknown.most_common()
            shown = ", ".join(f"{value!r} ({counted(count, 'row')})" for value, count in ranked[:_MAX_SHOWN])
            more = f" and {len(ranked) - _MAX_SHOWN:,} more" if len(ranked) > _MAX_SHOWN else ""
            declared = ", ".join(map(repr, list(self._meanings)[:_MAX_SHOWN]))
            raise DatasetError(
                f"column {self._column} holds labels that are not declared: {shown}{more} of {num_rows:,}. Expected {declared}: "
                "add each under `from` of its label, or set unlabelled: skip to leave these rows out."
            )
        if self._empty:
            raise DatasetError(
                f"{self._empty[0]}: column {self._column} is empty, as in {len(self._empty):,} of {num_rows:,} rows. Fill it in, "
                'or set unlabelled: skip to leave these rows out. "NA", "null" and "None" are values, not missing ones.'
            )

    def list_notes(self, num_rows: int) -> list[str]:
        notes = []
        if self._textless:
            notes.append(f"Left out {len(self._textless):,} of {num_rows:,} rows without a text (textless: skip).")
        if self._unknown:
            shown = ", ".join(f"{value!r} {count:,}" for value, count in self._unknown.most_common(_MAX_SHOWN))
            total = sum(self._unknown.values())
            notes.append(
                f"Left out {total:,} of {num_rows:,} rows, whose label is not declared: {shown} (unlabelled: skip)."
            )
        if self._empty:
            notes.append(f"Left out {len(self._empty):,} of {num_rows:,} rows without a label (unlabelled: skip).")
        return notes

    @property
    def _column(self) -> str:
        return self._task.columns.labels if self._task.kind == "multi" else self._task.columns.label

    def _label(self, row: TableRow) -> str | None:
        value = self._value(row, self._column)
        if value in self._meanings:  # an empty text can be declared too
            return self._meanings[value or ""]
        if value is None or not value.strip():
            self._empty.append(row.source)
        else:
            self._unknown[value] += 1
        return None

    def _labels(self, row: TableRow) -> frozenset[str] | None:
        raw = get(row.fields, self._column)
        if raw is None or raw == "":
            return frozenset()
        values = raw if isinstance(raw, list | tuple) else str(raw).split(self._task.separator)
        texts = [as_text(value) or "" for value in values]
        unknown = [text for text in texts if text not in self._meanings]
        self._unknown.update(unknown)
        return None if unknown else frozenset(self._meanings[text] for text in texts)

    def _value(self, row: TableRow, column: str) -> str | None:
        try:
            return as_text(get(row.fields, column))
        except TypeError as error:
            raise DatasetError(f"{row.source}, column {column}: found {error}, expected a text or a number.") from None

    def _text(self, row: TableRow, column: str) -> str:
        value = self._value(row, column)
        if value is None or not value.strip():
            raise DatasetError(
                f"{row.source}, column {column}: it is empty, expected a text. Fill it in, or take the row out."
            )
        return value

    def _side(self, row: TableRow) -> str:
        if self._task.split_by != "column":
            return row.side
        column = self._task.split.column or ""
        value = self._value(row, column)
        if value not in ("train", "test"):
            raise DatasetError(
                f"{row.source}, column {column}: found {shorten(value or '')}, expected train or test (split by column)."
            )
        return value


def make_printable(text: str) -> str:
    """Return a text without control characters, safe for tables and terminals."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


def read_number(task: TaskFile, value: Any, source: str) -> str:
    """Return a number in the form that the model answers: a point before the decimals, no separators of thousands.

    Args:
        source: `file:line` for messages.

    Raises:
        DatasetError: it is not a number with the task's decimal mark.
    """
    mark = task.number.decimal_mark
    other = "," if mark == "." else "."
    number: Decimal | None = None
    if isinstance(value, Decimal) or (isinstance(value, int | float) and not isinstance(value, bool)):
        number = Decimal(str(value)) if math.isfinite(value) else None
    elif isinstance(value, str):
        text = value.strip().replace("\N{MINUS SIGN}", "-").replace("\N{NO-BREAK SPACE}", " ")
        grouped = rf"-?\d{{1,3}}(?:{re.escape(other)}\d{{3}}| \d{{3}})*(?:{re.escape(mark)}\d+)?"
        if re.fullmatch(rf"{grouped}|-?\d+(?:{re.escape(mark)}\d+)?", text):
            number = Decimal(text.replace(other, "").replace(" ", "").replace(mark, "."))
    if number is None:
        raise DatasetError(
            f"{source}, column {task.columns.answer}: found {shorten(value)}, expected a number with {mark!r} before its "
            f"decimals and at most {other!r} between thousands (number.decimal_mark), without a unit or currency sign."
        )
    if task.number.decimals is not None:
        number = number.quantize(Decimal(1).scaleb(-task.number.decimals), ROUND_HALF_EVEN)
    return f"{number:f}"


def read_time(value: Any, form: str | None, source: str, column: str) -> datetime:
    """Return a time without a time zone, converted to UTC if it had one.

    Args:
        form: format of strptime; None: ISO 8601.
        source: `file:line` for messages.

    Raises:
        DatasetError: it is not a time of that format. For 03/04/2024, suggests the two formats it could have.
    """
    text = as_text(value) or ""
    read: Callable[[str], datetime] = datetime.fromisoformat
    if form is not None:
        read = lambda raw: datetime.strptime(raw, form)  # noqa: E731
    try:
        if text.isdigit() and form is None:  # 2024 or 20240403 could be a year, a date or seconds
            raise ValueError
        time = read(text.strip())
    except ValueError:
        raise DatasetError(f"{source}, column {column}: {_explain_time(text, form)}") from None
    return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)


def _explain_time(text: str, form: str | None) -> str:
    if form is not None:
        return f"found {shorten(text)}, expected a time of the format time_format={form!r}."
    if found := _AMBIGUOUS_DAY.match(text):
        sign = found[2]
        year = "%Y" if len(found[4]) == 4 else "%y"
        day_first, month_first = f"%d{sign}%m{sign}{year}", f"%m{sign}%d{sign}{year}"
        return (
            f'{text.strip()} is ambiguous, the day or the month could come first: give time_format: "{day_first}" or '
            f'"{month_first}".'
        )
    return (
        f"found {shorten(text)}, expected a date such as 2024-12-31: give time_format in the form of Python's strptime."
    )


def _read_weight(row: TableRow, column: str) -> float:
    value = get(row.fields, column)
    try:
        weight = float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not (math.isfinite(weight) and weight > 0):
        raise DatasetError(f"{row.source}, column {column}: found {shorten(value)}, expected a weight of more than 0.")
    return weight
