"""Plots of results by matplotlib, without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.report.pairing import Kept, Paired, Run
from finlora.report.scores import find_majority, name_column
from finlora.results import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart with colour-blind eyes and in grey print. Grey is kept for base models.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
GREY = "#8C8C8C"
_DPI = 130
_MAX_CURVES = 10


def draw_overview(paired: Paired) -> dict[str, Figure]:
    """Return the figures accuracy, loss and memory, each only if something was measured for it."""
    kept = paired.kept
    figures = {
        "accuracy": _draw_accuracy([each for each in kept if _has_accuracy(each.result)]),
        "loss": _draw_loss([each for each in kept if each.result.loss_curve]),
        "memory": _draw_memory([each for each in kept if each.result.peak_memory_gib is not None]),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _has_accuracy(result: Result) -> bool:
    return result.kind == "evaluation" and not math.isnan(result.metrics.get("accuracy", math.nan))


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of so many inches and its axes, in the style of all plots here."""
    figure, (axes,) = new_figures(1, width, height)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the path's ending names; after an error, as on a full disk, no part of it stays."""
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError:
        path.unlink(missing_ok=True)
        raise


def new_figures(num_columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return an empty figure with axes side by side that share their y axis."""
    figure, (row,) = new_grid(1, num_columns, width, height)
    return figure, row


def new_grid(num_rows: int, num_columns: int, width: float, height: float) -> tuple[Figure, list[list[Axes]]]:
    """Return an empty figure with rows of axes that share their y axis."""
    # The object interface: no pyplot, hence no global state and no display; savefig falls back to Agg.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    grid = [list(row) for row in figure.subplots(num_rows, num_columns, sharey=True, squeeze=False)]
    for axes in (axes for row in grid for axes in row):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=11)
        axes.set_axisbelow(True)
    return figure, grid


def add_legend(figure: Figure, size: float = 10.5) -> None:
    """Put the legend above the axes, in as many columns as fit the figure's width at a font of `size` points."""
    _, labels = figure.axes[0].get_legend_handles_labels()
    # A character is about 0.6 of the font's size wide, the sign and its gaps take 0.7 inches.
    widest = max(map(len, labels)) * 0.6 * size / 72 + 0.7
    columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
    figure.legend(loc="outside upper left", ncols=columns, fontsize=size, frameon=False)


def _draw_accuracy(evaluations: Sequence[Kept]) -> Figure | None:
    """Draw a bar a run, task by task, each task's base first and a line at what its most frequent label alone would bring."""
    if not evaluations:
        return None
    results = [result for _, result in evaluations]
    groups: dict[str, list[Kept]] = {}
    for each in sorted(evaluations, key=lambda each: (not each.run.is_base, each.run.base)):
        groups.setdefault(name_column(each.result, results), []).append(each)
    figure, axes = new_figure(9.0, 1.5 + 0.42 * len(evaluations) + 0.25 * len(groups))
    row, ticks, labels = 0.0, [], []
    majority_label: str | None = "always the most frequent label"
    for task, group in groups.items():
        rows = [row + number for number in range(len(group))]
        _draw_bars(axes, rows, group)
        ticks += rows
        labels += [f"{task}: {shorten(run.name)}, at {result.bits} bit" for run, result in group]
        majority = next((found for _, result in group if (found := find_majority(result))), None)
        if majority is not None:
            level, ends = 100 * majority.accuracy, (rows[0] - 0.45, rows[-1] + 0.45)
            axes.plot([level, level], ends, "--", color="#222222", linewidth=1.4, label=majority_label)
            majority_label = None
        row = rows[-1] + 1.6
    axes.set_yticks(ticks, labels, fontsize=9)
    axes.set_ylim(ticks[-1] + 0.7, -0.7)
    axes.set_xlim(0, 108)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("accuracy, % (95 % interval)", fontsize=12)
    axes.grid(axis="x", color="#DDDDDD")
    if any(result.is_partial for result in results):
        figure.suptitle("* part of the test split", fontsize=9, x=0.99, ha="right", color="#555555")
    if majority_label is None:
        add_legend(figure)
    return figure


def _draw_bars(axes: Axes, rows: Sequence[float], group: Sequence[Kept]) -> None:
    values = [100 * result.metrics["accuracy"] for _, result in group]
    errors = [_whiskers(result) for _, result in group]
    axes.barh(rows, values, 0.72, color=[GREY if run.is_base else COLOURS[0] for run, _ in group])
    whiskers = list(zip(*errors, strict=True))
    axes.errorbar(values, rows, xerr=whiskers, fmt="none", ecolor="#222222", elinewidth=1.2, capsize=3)
    for row, value, (_, above), (_, result) in zip(rows, values, errors, group, strict=True):
        text = f"{value:.1f}{'*' if result.is_partial else ''}"
        axes.annotate(text, (value + above, row), (4, 0), textcoords="offset points", va="center", fontsize=9)


def _draw_loss(trainings: Sequence[Kept]) -> Figure | None:
    if not trainings:
        return None
    shown = sorted(trainings, key=lambda each: each.result.created)[-_MAX_CURVES:]
    figure, axes = new_figure(8.0, 5.0)
    for number, (run, result) in enumerate(shown):
        steps, losses = zip(*result.loss_curve, strict=True)
        style = "-" if number < len(COLOURS) else "--"
        label = f"{shorten(run.name)}: {run.variant}, {result.task}"
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            steps, losses, style, color=colour, label=label, linewidth=1.8, marker="o" if len(steps) == 1 else None
        )
    axes.set_xlabel("optimiser step", fontsize=12)
    axes.set_ylabel("training loss", fontsize=12)
    axes.set_ylim(bottom=0)
    axes.grid(color="#DDDDDD")
    add_legend(figure)
    if len(trainings) > len(shown):
        axes.set_title(f"the newest {len(shown)} of {len(trainings)} runs", fontsize=10, loc="right")
    return figure


def _draw_memory(measured: Sequence[Kept]) -> Figure | None:
    if not measured:
        return None
    ordered, labels = [], []
    for (kind, run, bits, subject), group in _group_memory(measured).items():
        ordered.append(max(group, key=lambda result: result.peak_memory_gib or 0.0))
        what = f"{kind} of {subject}" if subject else f"{kind}, highest of {len(group)} measured"
        labels.append(f"{shorten(run.name)}, {bits} bit\n{what}")
    values = [result.peak_memory_gib or 0.0 for result in ordered]
    figure, axes = new_figure(9.0, 1.3 + 0.55 * len(ordered))
    colours = [COLOURS[0] if result.kind == "training" else COLOURS[1] for result in ordered]
    bars = axes.barh(range(len(ordered)), values, 0.68, color=colours)
    axes.bar_label(
        bars, [f"{value:.1f}" if value >= 10 else f"{value:.2f}" for value in values], padding=4, fontsize=10
    )
    axes.set_yticks(range(len(ordered)), labels, fontsize=9.5)
    axes.set_ylim(len(ordered) - 0.4, -0.6)
    axes.set_xlim(0, max(values) * 1.12 or 1)
    axes.set_xlabel("peak memory, GiB, summed over workers", fontsize=12)
    axes.grid(axis="x", color="#DDDDDD")
    return figure


def _group_memory(measured: Sequence[Kept]) -> dict[tuple[str, Run, int, str], list[Result]]:
    """Put the evaluations of one run together, because its tasks differ little; each training has its own bar."""
    groups: dict[tuple[str, Run, int, str], list[Result]] = {}
    for run, result in sorted(measured, key=lambda each: (each.result.kind, each.run.base, each.run.name)):
        subject = result.task if result.kind == "training" else ""
        groups.setdefault((result.kind, run, result.bits, subject), []).append(result)
    return groups


def _whiskers(result: Result) -> tuple[float, float]:
    value = result.metrics["accuracy"]
    low, high = result.metrics.get("accuracy_low", value), result.metrics.get("accuracy_high", value)
    below, above = 100 * (value - low), 100 * (high - value)
    return (0.0 if math.isnan(below) else max(below, 0.0), 0.0 if math.isnan(above) else max(above, 0.0))


def shorten(name: str) -> str:
    """Return a name cut in its middle to what fits beside a bar."""
    return name if len(name) <= 34 else name[:16] + "…" + name[-17:]
