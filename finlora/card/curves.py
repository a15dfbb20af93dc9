"""Figures of an evaluation that need its answers one by one: abstention, length of text, rows from before the base's cut-off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from finlora.evaluate.answer_table import AnswerTable
from finlora.evaluate.intervals import accuracy_interval, wilson_interval
from finlora.results import Result

THRESHOLDS = (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
NUM_LENGTHS = 4


class Slice(NamedTuple):
    """Accuracy on a part of the test rows."""

    name: str
    num_rows: int
    share: float
    """Of all rows."""
    accuracy: float
    low: float
    high: float


def make_abstention_curve(result: Result, table: AnswerTable | None, seed: int) -> list[Slice]:
    """Return, for each threshold, the rows whose label is at least that probable; empty where labels were not scored.

    Args:
        table: None: thresholds are the bounds of the result's bins of probability, and intervals ignore groups.
    """
    if table is None:
        return _make_from_bins(result)
    probabilities = [0.0 if value is None else value for value in table.probability]
    if not any(probabilities):
        return []
    rows = [
        (threshold, [index for index, value in enumerate(probabilities) if value >= threshold])
        for threshold in THRESHOLDS
    ]
    return [_slice(f"{threshold:g}", table, indices, seed) for threshold, indices in rows if indices]


def trace_abstention(table: AnswerTable, num_points: int = 200) -> list[tuple[float, float]]:
    """Return points of the curve for a plot: share of rows answered, and the accuracy on them, likeliest rows first."""
    ranked = sorted(
        ((value, right) for value, right in zip(table.probability, table.is_right, strict=True) if value is not None),
        key=lambda pair: -pair[0],
    )
    points, num_right = [], 0
    every = max(1, len(ranked) // num_points)
    for number, (_, right) in enumerate(ranked, start=1):
        num_right += right
        if number % every == 0 or number == len(ranked):
            points.append((number / len(table), num_right / number))
    return points


def slice_by_length(table: AnswerTable, seed: int) -> list[Slice]:
    """Return the accuracy in up to four groups of rows by the length of their prompt, about equally many rows each."""
    ordered = sorted(table.chars)
    bounds = sorted({ordered[(len(ordered) * part) // NUM_LENGTHS - 1] for part in range(1, NUM_LENGTHS + 1)})
    slices, above = [], 0
    for bound in bounds:
        indices = [index for index, chars in enumerate(table.chars) if above < chars <= bound]
        if indices:
            shortest = min(table.chars[index] for index in indices)
            slices.append(_slice(f"{shortest:,} to {bound:,} characters", table, indices, seed))
        above = bound
    return slices


def slice_by_cutoff(table: AnswerTable, day: str, seed: int) -> list[Slice]:
    """Return the accuracy on rows dated up to a day, behind it, and without a date.

    Args:
        day: last day of the base's training data, as 2023-12-31.
    """
    groups = {
        f"dated up to {day}": [index for index, time in enumerate(table.time) if time and time[:10] <= day],
        f"dated after {day}": [index for index, time in enumerate(table.time) if time and time[:10] > day],
        "without a date": [index for index, time in enumerate(table.time) if not time],
    }
    return [_slice(name, table, indices, seed) for name, indices in groups.items() if indices]


def _slice(name: str, table: AnswerTable, indices: Sequence[int], seed: int) -> Slice:
    flags = [table.is_right[index] for index in indices]
    groups = [str(table.group[index]) for index in indices]
    low, high = accuracy_interval(flags, groups, seed=seed)
    return Slice(name, len(indices), len(indices) / len(table), sum(flags) / len(flags), low, high)


def _make_from_bins(result: Result) -> list[Slice]:
    total = sum(each["count"] for each in result.calibration)
    slices = []
    for number, first in enumerate(result.calibration):
        kept = result.calibration[number:]
        count = sum(each["count"] for each in kept)
        right = sum(each["count"] * each["accuracy"] for each in kept)
        threshold = f"{first['low']:g}" if number else "0"
        slices.append(Slice(threshold, round(count), count / total, right / count, *wilson_interval(right, count)))
    return slices
