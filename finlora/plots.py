"""Results -> plots by matplotlib, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.pairing import Kept, Paired, Run
from finlora.results import Result
from finlora.scores import find_majority, name_column

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
    drawn = {
        "accuracy": _draw_accuracy([each for each in kept if _has_accuracy(each.result)]),
        "loss": _draw_loss([each for each in kept if each.result.loss_curve]),
        "memory": _draw_memory([each for each in kept if each.result.peak_memory_gib is not None]),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _has_accuracy(result: Result) -> bool:
    return result.kind == "evaluation" and not math.isnan(result.metrics.get("accuracy", math.nan))


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Return an empty figure of so many inches and its axes, in the style of all plots here."""
    figure, (axes,) = new_figures(1, width, height)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the path's ending names."""
    figure.savefig(path, dpi=_DPI)


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


def _add_legend(figure: Figure) -> None:
    """Put the legend above the axes, in as many columns as fit the figure's width."""
    size = 10.5
    _, labels = figure.axes[0].get_legend_handles_labels()
    # A character is about 0.6 of the font's size wide, the sign and its gaps take 0.7 inches.
    widest = max(map(len, labels)) * 0.6 * size / 72 + 0.7
    columns = max(1, min(len(labels), int(figure.get_figwidth() / widest)))
    figure.legend(loc="outside upper left", ncols=columns, fontsize=size, frameon=False)


def _draw_accuracy(evaluations: Sequence[Kept]) -> Figure | None:
    if not evaluations:
        return None
    results = [result for _, result in evaluations]
    tasks = list(dict.fromkeys(name_column(result, results) for result in results))
    ordered = sorted(evaluations, key=lambda each: (each.run.base, not each.run.is_base))
    series: dict[tuple[Run, int], dict[str, Result]] = {}
    for run, result in ordered:
        series.setdefault((run, result.bits), {})[name_column(result, results)] = result
    figure, axes = new_figure(max(6.5, 1.5 + len(tasks) * (0.7 + 0.42 * len(series))), 5.2)
    width = 0.8 / len(series)
    colours = _assign_colours(list(series))
    for position, (key, row) in enumerate(series.items()):
        places = [tasks.index(task) + (position - (len(series) - 1) / 2) * width for task in row]
        values = [100 * result.metrics["accuracy"] for result in row.values()]
        errors = [_whiskers(result) for result in row.values()]
        bars = axes.bar(places, values, width * 0.92, color=colours[key], label=_name_series(key))
        axes.errorbar(
            places,
            values,
            yerr=list(zip(*errors, strict=True)),
            fmt="none",
            ecolor="#222222",
            elinewidth=1.2,
            capsize=3,
        )
        for bar, result, (_, above) in zip(bars, row.values(), errors, strict=True):
            mark = "*" if result.is_partial else ""
            top = (bar.get_x() + bar.get_width() / 2, bar.get_height() + above)
            text = f"{bar.get_height():.1f}{mark}"
            axes.annotate(text, top, (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=9)
    _draw_majorities(axes, tasks, results)
    slant = 0 if len(tasks) <= 4 or max(map(len, tasks)) <= 9 else 25
    axes.set_xticks(range(len(tasks)), tasks, rotation=slant, ha="right" if slant else "center")
    axes.set_xlim(-0.6, len(tasks) - 0.4)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("accuracy, % (95 % interval)", fontsize=12)
    axes.grid(axis="y", color="#DDDDDD")
    if any(result.is_partial for result in results):
        figure.supxlabel("* part of the test split", fontsize=9, x=0.99, ha="right", color="#555555")
    _add_legend(figure)
    return figure


def _draw_majorities(axes: Axes, tasks: Sequence[str], results: Sequence[Result]) -> None:
    """Draw what always answering a task's most frequent label would bring, as a line across its bars."""
    label: str | None = "always the most frequent label"
    for number, task in enumerate(tasks):
        found = (find_majority(result) for result in results if name_column(result, results) == task)
        majority = next((each for each in found if each is not None), None)
        if majority is not None:
            level = 100 * majority.accuracy
            axes.plot([number - 0.45, number + 0.45], [level, level], "--", color="#222222", linewidth=1.4, label=label)
            label = None


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
    _add_legend(figure)
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
    """Put the evaluations of one run together, because its tasks differ little; each training stands alone."""
    groups: dict[tuple[str, Run, int, str], list[Result]] = {}
    for run, result in sorted(measured, key=lambda each: (each.result.kind, each.run.base, each.run.name)):
        subject = result.task if result.kind == "training" else ""
        groups.setdefault((result.kind, run, result.bits, subject), []).append(result)
    return groups


def _assign_colours(keys: Sequence[tuple[Run, int]]) -> dict[tuple[Run, int], str]:
    """Give grey to a lone base and the palette to everything else, in order."""
    bases = [key for key in keys if key[0].is_base]
    others = [key for key in keys if key not in bases or len(bases) > 1]
    return dict.fromkeys(bases, GREY) | {key: COLOURS[i % len(COLOURS)] for i, key in enumerate(others)}


def _name_series(key: tuple[Run, int]) -> str:
    run, bits = key
    return f"{shorten(run.name)}, at {bits} bit"


def _whiskers(result: Result) -> tuple[float, float]:
    value = result.metrics["accuracy"]
    low, high = result.metrics.get("accuracy_low", value), result.metrics.get("accuracy_high", value)
    below, above = 100 * (value - low), 100 * (high - value)
    return (0.0 if math.isnan(below) else max(below, 0.0), 0.0 if math.isnan(above) else max(above, 0.0))


def shorten(name: str) -> str:
    """Return a name cut in its middle to what fits beside a bar."""
    return name if len(name) <= 34 else name[:16] + "…" + name[-17:]
