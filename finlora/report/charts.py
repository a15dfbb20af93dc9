"""Charts of results: confusion matrices, reliability diagrams, and bars of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from finlora.report.pairing import Kept
from finlora.report.plots import COLOURS, add_legend, new_figure, shorten
from finlora.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MAX_CLASSES = 12
"""Most classes of a readable matrix."""
_DARK = 0.55
"""Share of a row above which its number is written in white."""


def describe(each: Kept) -> str:
    """Name a measurement in a line, its run first."""
    run, result = each
    method = f" by {result.method}" if result.method else ""
    return f"{shorten(run.name)}: {result.task}, at {result.bits} bit{method}"


def has_matrix(result: Result) -> bool:
    """Return whether an evaluation has counts to plot."""
    return 0 < len(result.counts) <= _MAX_CLASSES


def draw_confusion(result: Result) -> Figure:
    """Draw label against prediction: the number of examples, coloured by their share of the label."""
    labels = list(result.counts)
    found = {prediction for row in result.counts.values() for prediction in row}
    predictions = labels + sorted(found - set(labels))
    shares = []
    for label in labels:
        row = result.counts[label]
        total = sum(row.values()) or 1
        shares.append([row.get(prediction, 0) / total for prediction in predictions])
    longest = max(map(len, predictions))
    size = 1.9 + 0.75 * len(predictions) + 0.07 * longest
    figure, axes = new_figure(size + 0.6, 1.3 + 0.62 * len(labels) + 0.07 * longest)
    axes.imshow(shares, cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    for y, label in enumerate(labels):
        for x, prediction in enumerate(predictions):
            number = result.counts[label].get(prediction, 0)
            colour = "white" if shares[y][x] > _DARK else "#222222"
            axes.text(x, y, f"{number:,}", ha="center", va="center", color=colour, fontsize=10)
    slant = 30 if longest > 8 else 0
    axes.set_xticks(range(len(predictions)), predictions, rotation=slant, ha="right" if slant else "center")
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("answer", fontsize=12)
    axes.set_ylabel("truth", fontsize=12)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    return figure


def draw_reliability(result: Result) -> Figure:
    """Draw the share of right answers over the probability they were given with, and how many there were of each."""
    figure, axes = new_figure(5.0, 4.4)
    bins = result.calibration
    middles = [(each["low"] + each["high"]) / 2 for each in bins]
    total = sum(each["count"] for each in bins)
    axes.bar(
        middles, [each["count"] / total for each in bins], 0.094, color="#D0D0D0", label="share of answers", zorder=1
    )
    axes.plot([0, 1], [0, 1], "--", color="#666666", linewidth=1.2, label="as probable as right", zorder=2)
    axes.plot(
        [each["confidence"] for each in bins],
        [each["accuracy"] for each in bins],
        "o-",
        color=COLOURS[0],
        linewidth=1.8,
        label="share of right answers",
        zorder=3,
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("probability of the chosen answer", fontsize=12)
    axes.set_ylabel("share", fontsize=12)
    axes.grid(color="#EEEEEE")
    error = result.metrics.get("calibration_error", math.nan)
    axes.set_title(f"expected calibration error {100 * error:.1f} %", fontsize=10.5, loc="left")
    add_legend(figure, size=9)
    return figure


def draw_times(kept: Sequence[Kept], kind: Literal["training", "evaluation"]) -> Figure | None:
    """Draw a bar of wall time a training, or of seconds an example an evaluation; None where nothing was timed."""
    is_training = kind == "training"
    timed = [
        (each, each.result.wall_seconds if is_training else each.result.seconds_per_example)
        for each in kept
        if each.result.kind == kind
    ]
    rows = [(describe(each), seconds) for each, seconds in timed if seconds is not None]
    if not rows:
        return None
    figure, axes = new_figure(9.0, 1.1 + 0.42 * len(rows))
    bars = axes.barh(range(len(rows)), [seconds for _, seconds in rows], 0.66, color=COLOURS[0 if is_training else 1])
    axes.bar_label(bars, [f"{seconds:,.0f}" if is_training else f"{seconds:.3g}" for _, seconds in rows], padding=4)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=9)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, max(seconds for _, seconds in rows) * 1.15 or 1)
    axes.set_xlabel("time of training at work, all attempts, s" if is_training else "seconds an example", fontsize=12)
    axes.grid(axis="x", color="#DDDDDD")
    return figure
