"""Table printed on a terminal of any width: figures stay whole, and rows become `key: value` lines where columns do not fit.

Rich breaks words, drops columns and cuts cells where a table is wider than its terminal: 0.0039 became `0.`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

_BREAK_FROM = 8
"""A word without a digit stays whole up to this length; a longer one may be broken, never a word with a digit."""
_GAP, _NARROW_GAP = 3, 2
"""Characters between two columns; the narrow gap is taken where the wide one does not fit."""
_NUMBER_WIDTH = 8
"""Columns of numbers are not made wider for the sake of a text such as `not measured`, which then takes two lines."""

Cell = str | Text


def print_table(
    console: Console,
    header: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    *,
    title: str = "",
    right: Collection[int] = (),
    numbers: Collection[int] = (),
) -> None:
    """Print rows of plain text below a header; Rich's markup is not read.

    Args:
        rows: one cell for each column. A cell may have several lines.
        right: columns that are aligned to the right.
        numbers: columns of numbers, which leave the width to the others.
    """
    cells = [[_as_text(cell) for cell in row] for row in rows]
    natural, whole, least = [], [], []
    for index, name in enumerate(header):
        texts = [name, *(row[index].plain for row in cells)]
        widest = max(len(line) for text in texts for line in (text.splitlines() or [""]))
        words = [word for text in texts for word in text.split()]
        natural.append(min(widest, max(len(name), _NUMBER_WIDTH)) if index in numbers else widest)
        whole.append(max(map(len, words), default=0))
        least.append(max(map(_unbroken, words), default=0))
    natural = [max(pair) for pair in zip(natural, least, strict=True)]
    gap = _GAP if sum(natural) + _frame(len(header), _GAP) <= console.width else _NARROW_GAP
    room = console.width - _frame(len(header), gap)
    if title:
        console.print(Text(title, style="bold"))
    if sum(least) > room:
        _print_records(console, header, cells)
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1) if gap == _GAP else (0, 1, 0, 0))
    for index, (name, width) in enumerate(zip(header, _share(natural, whole, least, room), strict=True)):
        table.add_column(Text(name), width=width, overflow="fold", justify="right" if index in right else "left")
    for row in cells:
        table.add_row(*row)
    console.print(table)


def _as_text(cell: Cell) -> Text:
    # Rich wraps a word behind a leading space as if the space were part of it, and would cut a figure.
    return cell if isinstance(cell, Text) else Text("\n".join(" ".join(line.split()) for line in cell.splitlines()))


def _unbroken(word: str) -> int:
    """Return the width that a word needs at least."""
    return len(word) if any(map(str.isdigit, word)) else min(len(word), _BREAK_FROM)


def _frame(num_columns: int, gap: int) -> int:
    """Return the characters of a table that are outside its cells: Rich's edges and the gaps."""
    return num_columns * gap + 1


def _share(natural: Sequence[int], whole: Sequence[int], least: Sequence[int], room: int) -> list[int]:
    """Return the columns' widths: the widest give way first, as long as possible without a broken word."""
    widths = list(natural)
    for bounds in (whole, least):
        while sum(widths) > room and (wide := [i for i, width in enumerate(widths) if width > bounds[i]]):
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _print_records(console: Console, header: Sequence[str], rows: Sequence[Sequence[Text]]) -> None:
    """Print a line for each filled cell, and an empty line behind each row."""
    for row in rows:
        for name, cell in zip(header, row, strict=True):
            if cell.plain.strip():
                line = Text(f"{name}: " if name else "").append_text(Text(" ").join(cell.split("\n")))
                console.print(line, overflow="fold")
        console.print()
