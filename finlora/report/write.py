"""Report of results on the terminal, as one HTML file and as Markdown: `finlora report RUNS --output DIR`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from finlora.durable import write_whole
from finlora.errors import ResultError
from finlora.printed_table import print_table
from finlora.report.deviations import deviation_table
from finlora.report.other_base import other_base_tables
from finlora.report.pairing import Paired, pair_results
from finlora.report.scores import score_table, segment_table
from finlora.report.seeds import group_by_seed, seed_table
from finlora.report.tables import (
    NOT_MEASURED,
    NOT_RUN,
    TextTable,
    cost_table,
    differences_table,
    environment_table,
    left_out_table,
    paper_tables,
    provenance_table,
    wire_table,
)
from finlora.results import Result, read_results

_TITLES = {
    "accuracy": "Accuracy",
    "loss": "Learning curves",
    "memory": "Peak memory",
    "training-time": "Time of training",
    "evaluation-time": "Time of evaluation",
}


def show_results(results: Sequence[Result], console: Console) -> None:
    """Print scores, cost and traffic of these results."""
    _show(pair_results(results), console)


def list_base_scores(path: Path, results: Sequence[Result]) -> list[Result]:
    """Return the scores of a base in a results file on the same questions as these results. A damaged file gives none."""
    asked = {(result.task, result.data_hash) for result in results}
    try:
        earlier = read_results(path) if path.exists() else []
    except ResultError:
        return []
    return [
        result
        for result in earlier
        if result.kind == "evaluation" and result.variant == "base" and (result.task, result.data_hash) in asked
    ]


def _show(paired: Paired, console: Console) -> None:
    for table in (
        score_table(paired),
        seed_table(paired),
        segment_table(paired),
        cost_table(paired),
        wire_table(paired),
    ):
        if table.rows:
            draw_table(table, console)


def render_report(
    results: list[Result],
    output: Path | None,
    console: Console,
    first: Sequence[TextTable] = (),
    searches: Sequence[Path] = (),
) -> None:
    """Print every table, ours and beside the paper, and write them into a folder.

    Args:
        results: of any number of runs.
        output: folder for report.html, which holds everything, and report.md with its PNG plots. None: print only.
        console: where the tables go.
        first: tables before all others.
        searches: folders whose trials are not among the results, to be named.

    Raises:
        ResultError: there are no results, or the folder cannot be written.
    """
    if not results:
        raise ResultError("there are no results to report: run `finlora train` or `finlora evaluate` first.")
    paired = pair_results(results)
    left_out = left_out_table(paired, searches)
    for table in first:
        draw_table(table, console)
    _show(paired, console)
    beside = [*other_base_tables(paired), *paper_tables(paired)]
    for table in (*beside, *([left_out] if left_out.rows else [])):
        draw_table(table, console)
    if output is None:
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        num_plots = _write(paired, first, beside, left_out, output)
    except OSError as error:
        raise ResultError(
            f"the report cannot be written to {output} ({error}): give a folder you may write to."
        ) from error
    names = f"{output / 'report.html'}, report.md"
    console.print(f"Written: {names} and {num_plots} plots", highlight=False, soft_wrap=True)


def _write(
    paired: Paired, first: Sequence[TextTable], beside: Sequence[TextTable], left_out: TextTable, output: Path
) -> int:
    """Write report.md with its PNG plots, and report.html with all in it; returns the number of plots."""
    from finlora.report.charts import describe, draw_confusion, draw_reliability, draw_times, has_matrix
    from finlora.report.plots import draw_overview, save_figure  # matplotlib takes a second to import
    from finlora.report.webpage import Section, embed, render_page

    figures = draw_overview(paired)
    for kind in ("training", "evaluation"):
        if figure := draw_times(paired.kept, kind):
            figures[f"{kind}-time"] = figure
    others = {id(each.result) for group in group_by_seed(paired.kept) for each in group[1:]}
    drawn_once = [each for each in paired.kept if id(each.result) not in others]  # of several seeds the first
    matrices = [(describe(each), draw_confusion(each.result)) for each in drawn_once if has_matrix(each.result)]
    curves = [(describe(each), draw_reliability(each.result)) for each in drawn_once if each.result.calibration]
    tables = [
        *first,
        score_table(paired),
        cost_table(paired),
        seed_table(paired),
        segment_table(paired),
        wire_table(paired),
        *beside,
        deviation_table(paired),
        differences_table(),
    ]
    tables += [left_out, provenance_table(paired), environment_table(paired)]
    paths = [output / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        save_figure(figure, path)
    for group, drawn in (("confusion", matrices), ("reliability", curves)):
        for number, (_, figure) in enumerate(drawn, start=1):
            paths.append(output / f"{group}-{number}.png")
            save_figure(figure, paths[-1])
    write_whole(output / "report.md", render_markdown("FinLoRA results", tables, paths))
    sections = [Section(table.title, table) for table in tables if table.rows]
    plots = [
        *(Section(_TITLES[name], images=(embed(figure, _TITLES[name]),)) for name, figure in figures.items()),
        *(
            [Section("Confusion matrices", images=tuple(embed(figure, name) for name, figure in matrices))]
            if matrices
            else []
        ),
        *(
            [Section("Reliability of probabilities", images=tuple(embed(figure, name) for name, figure in curves))]
            if curves
            else []
        ),
    ]
    sections[len(first) + 2 : len(first) + 2] = plots  # scores and cost, then plots, then the rest
    created = [result.created for _, result in paired.kept if result.created]
    num_runs = len({run for run, _ in paired.kept if not run.is_base})
    subtitle = f"{_count(len(paired.kept), 'measurement')}, {_count(num_runs, 'trained run')}"
    days = sorted({moment[:10] for moment in created})
    subtitle += f", {' to '.join(dict.fromkeys((days[0], days[-1])))}" if days else ""
    subtitle += f". {len(left_out.rows)} left out, listed below with the reason" if left_out.rows else ""
    write_whole(output / "report.html", render_page("FinLoRA results", subtitle, sections))
    return len(paths)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def draw_table(table: TextTable, console: Console) -> None:
    """Print a table with its notes below."""
    rows = [
        [Text(cell, style="dim" if cell.startswith((NOT_RUN, NOT_MEASURED)) else "") for cell in row]
        for row in table.rows
    ]
    numbers = [index for index in range(len(table.header)) if all(_is_number(row[index]) for row in table.rows)]
    print_table(console, table.header, rows, title=table.title, numbers=numbers)
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
        parts.append("\n".join([f"## {table.title}\n", *list_markdown_rows(table)]) + "\n")
        parts.extend(note.replace("*", "\\*") + "\n" for note in table.notes)
    if plots:
        parts.append("## Plots\n")
        parts.extend(f"![{plot.stem}]({plot.name})\n" for plot in plots)
    return "\n".join(parts)


def list_markdown_rows(table: TextTable) -> list[str]:
    """Return a table's header and rows as lines of Markdown."""
    return [_markdown_row(table.header), _markdown_row(["---"] * len(table.header)), *map(_markdown_row, table.rows)]


def _markdown_row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|").replace("*", "\\*").replace("\n", "<br>") for cell in cells)
    return f"| {' | '.join(escaped)} |"
