"""Show results on the terminal and write them as Markdown and plots: `finlora report RUNS --output DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finlora.errors import ResultError
from finlora.results import Result
from finlora.tables import NOT_MEASURED, NOT_RUN, TextTable, cost_table, paper_tables, score_table, wire_table

_KEYS = 3
"""Leading columns of the score table that name a row."""
_CELL_WIDTH = 27
_MIN_WIDTH = 8
"""Words up to this length are not broken when the terminal is narrow: those of `not measured`."""


def show_results(results: Sequence[Result], console: Console) -> None:
    """Print scores, cost and traffic of these results. A score table wider than the terminal goes on in a second one below."""
    scores = score_table(results)
    if scores.rows:
        num_tasks = len(scores.header) - _KEYS
        labels = sum(max(len(row[column]) for row in (scores.header, *scores.rows)) + 3 for column in range(_KEYS))
        step = max(1, (console.width - labels) // _CELL_WIDTH)
        for start in range(_KEYS, _KEYS + num_tasks, step):
            is_last = start + step >= _KEYS + num_tasks
            draw_table(_take_columns(scores, start, step, scores.notes if is_last else ()), console)
    draw_table(cost_table(results), console)
    traffic = wire_table(results)
    if traffic.rows:
        draw_table(traffic, console)


def render_report(results: list[Result], output: Path | None, console: Console) -> None:
    """Print every table, ours and beside the paper, and write them into a folder.

    Args:
        results: of any number of runs; the newest measurement of each kind counts.
        output: folder for report.md and its PNG plots, created if missing. None: print only.
        console: where the tables go.

    Raises:
        ResultError: there are no results, or the folder cannot be written.
    """
    if not results:
        raise ResultError("there are no results to report: run `finlora train` or `finlora evaluate` first.")
    show_results(results, console)
    beside = paper_tables(results)
    compared = [table for table in beside if any(not cells[-1].startswith(NOT_RUN) for cells in table.rows)]
    for table in compared:
        draw_table(table, console)
    if len(compared) < len(beside):
        note = f"{len(beside) - len(compared)} of the paper's {len(beside)} tables have no cell run here"
        console.print(f"{note}; report.md lists them all." if output else f"{note}; --output lists them all.")
    if output is None:
        return
    from finlora.plots import save_plots  # matplotlib takes a second to import

    try:
        output.mkdir(parents=True, exist_ok=True)
        plots = save_plots(results, output)
        text = render_markdown(
            "FinLoRA results", [score_table(results), cost_table(results), wire_table(results), *beside], plots
        )
        (output / "report.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResultError(
            f"the report cannot be written to {output} ({error}): give a folder you may write to."
        ) from error
    console.print(f"Written: {output / 'report.md'} and {len(plots)} plots", highlight=False, soft_wrap=True)


def _take_columns(table: TextTable, start: int, count: int, notes: tuple[str, ...]) -> TextTable:
    def take(row: tuple[str, ...]) -> tuple[str, ...]:
        return row[:_KEYS] + row[start : start + count]

    return TextTable(title=table.title, header=take(table.header), rows=tuple(map(take, table.rows)), notes=notes)


def draw_table(table: TextTable, console: Console) -> None:
    """Print a table with its notes below."""
    drawn = Table(title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for index, name in enumerate(table.header):
        cells = [row[index] for row in table.rows]
        longest = max(len(word) for word in " ".join((name, *cells)).split())
        # `not measured` takes two lines in a column of plain numbers, which leaves the width to names.
        width = max(len(name), _MIN_WIDTH) if all(map(_is_number, cells)) else None
        drawn.add_column(Text(name), overflow="fold", min_width=min(longest, _MIN_WIDTH), max_width=width)
    for row in table.rows:
        drawn.add_row(*(Text(cell, style="dim" if cell.startswith((NOT_RUN, NOT_MEASURED)) else "") for cell in row))
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note, style="dim"))


def _is_number(cell: str) -> bool:
    return cell in (NOT_MEASURED, "none", "NaN") or cell.replace(",", "").replace(".", "", 1).isdigit()


def render_markdown(title: str, tables: Sequence[TextTable], plots: Sequence[Path]) -> str:
    """Return tables and plots as a Markdown text; plots are named as files beside it."""
    parts = [f"# {title}\n"]
    for table in tables:
        if not table.rows:
            continue
        lines = [f"## {table.title}\n", _markdown_row(table.header), _markdown_row(["---"] * len(table.header))]
        parts.append("\n".join([*lines, *map(_markdown_row, table.rows)]) + "\n")
        parts.extend(note.replace("*", "\\*") + "\n" for note in table.notes)
    if plots:
        parts.append("## Plots\n")
        parts.extend(f"![{plot.stem}]({plot.name})\n" for plot in plots)
    return "\n".join(parts)


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("*", "\\*").replace("\n", "<br>") for cell in cells)
    return f"| {' | '.join(escaped)} |"
