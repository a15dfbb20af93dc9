"""Scores of all runs, a task at a time: the answer of the most frequent label first, then the base, then its adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from finlora.report.pairing import Kept, Paired, short
from finlora.report.tables import TextTable, format_number, format_score
from finlora.results import Result

_MAX_CLASSES = 1000
"""Labels up to which a task counts as one of closed answers."""


class Majority(NamedTuple):
    """Scores of always answering the most frequent label of a test split."""

    label: str
    accuracy: float
    weighted_f1: float


def find_majority(result: Result) -> Majority | None:
    """Return it by the confusion counts of any evaluation on the split; None where they do not cover it, as with free text."""
    totals = {label: sum(row.values()) for label, row in result.counts.items()}
    if not 1 < len(totals) <= _MAX_CLASSES or sum(totals.values()) != (result.num_examples or sum(totals.values())):
        return None
    label = max(totals, key=lambda name: totals[name])
    share = totals[label] / max(sum(totals.values()), 1)
    # F1 of a constant answer: precision is its share, recall 1; all other labels have 0.
    return Majority(label, share, share * 2 * share / (1 + share))


def score_table(paired: Paired) -> TextTable:
    """One row for each run and task, beside the majority line of the task and the score of the run's base."""
    evaluations = [each for each in paired.kept if each.result.kind == "evaluation"]
    all_results = [result for _, result in evaluations]
    groups: dict[str, list[Kept]] = {}
    for each in evaluations:
        groups.setdefault(name_column(each.result, all_results), []).append(each)
    has_numbers = any("numeric_accuracy" in result.metrics for result in all_results)
    rows: list[tuple[str, ...]] = []
    told: list[str] = []
    for column, group in groups.items():
        majority = next((found for _, result in group if (found := find_majority(result))), None)
        if majority is not None:
            line = (column, "majority class", f"always {majority.label}", "", f"{100 * majority.accuracy:.1f}")
            rows.append((*line, f"{100 * majority.weighted_f1:.1f}", "", *([""] if has_numbers else []), ""))
        for each in sorted(group, key=lambda each: (not each.run.is_base, each.run.base)):
            rows.append(_score_row(column, each, paired, has_numbers=has_numbers))
            told += _tell(column, each, paired, majority)
    notes = [
        *told,
        *_name_unscored(paired),
        "% with 95 % interval. Accuracy: the answer contains the truth; strict: it is the truth alone; F1 is weighted over "
        "labels. Against base: points of accuracy, at the same bits and on the same questions.",
    ]
    if has_numbers:
        notes.append(
            "Within 1 %: of the questions whose answer is a number, the share answered to one part in a hundred, or within the "
            "task file's own tolerance."
        )
    if any(result.is_partial for result in all_results):
        notes.append("* Partial: not every example of the prepared test split was scored.")
    numbers = ("within 1 %",) if has_numbers else ()
    return TextTable(
        title="Evaluation",
        header=("task", "run", "model", "bits", "accuracy", "weighted F1", "strict", *numbers, "against base"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def segment_table(paired: Paired) -> TextTable:
    """One row for each run, task and value of a segment column, for tasks of task files that name segments."""
    found = [
        (each, f"{column}={value}", metrics)
        for each in paired.kept
        for column, values in each[1].segments.items()
        for value, metrics in values.items()
    ]
    has_yes = any("yes_f1" in metrics for _, _, metrics in found)
    scores = {"accuracy": "accuracy", "weighted F1": "weighted_f1", "strict": "strict_accuracy"}
    own = {"F1 of Yes": "yes_f1", "precision": "yes_precision", "recall": "yes_recall"} if has_yes else {}
    notes = ["% with 95 % interval, as above. A segment of few examples has a wide interval."]
    if has_yes:
        notes.append("F1, precision and recall of Yes: of the rows that have the label, or whose answer is Yes.")
    return TextTable(
        title="Scores by segment",
        header=("task", "run", "segment", "examples", *scores, *own),
        rows=tuple(
            (
                *(result.task, run.name, name, format_number(metrics["count"], 0)),
                *(format_score(replace(result, metrics=metrics), key) for key in scores.values()),
                *(
                    format_score(replace(result, metrics=metrics), key) if key in metrics else "none"
                    for key in own.values()
                ),
            )
            for (run, result), name, metrics in found
        ),
        notes=tuple(notes),
    )


def name_column(result: Result, evaluations: Sequence[Result]) -> str:
    """Return the task, with method and test split behind it only where the task was scored by or on several."""
    same = [other for other in evaluations if other.task == result.task]
    marks = []
    if len({other.method for other in same}) > 1:
        marks.append(result.method or "method unknown")
    if len({other.data_hash for other in same}) > 1:
        marks.append(f"test split {short(result.data_hash)}")
    return f"{result.task} ({', '.join(marks)})" if marks else result.task


def _score_row(column: str, each: Kept, paired: Paired, *, has_numbers: bool) -> tuple[str, ...]:
    run, result = each
    mark = "*" if result.is_partial else ""
    # Free text has no classes.
    has_f1 = "weighted_f1" in result.metrics or "accuracy" not in result.metrics
    number = format_score(result, "numeric_accuracy") if "numeric_accuracy" in result.metrics else "none"
    return (
        column,
        *run.row,
        str(result.bits),
        f"{format_score(result, 'accuracy')}{mark}",
        format_score(result, "weighted_f1") if has_f1 else "none",
        format_score(result, "strict_accuracy"),
        *((number,) if has_numbers else ()),
        "" if run.is_base else _compare(result, paired.base_of(run, result)),
    )


def _compare(result: Result, base: Result | None) -> str:
    if base is None:
        return "not run"
    gain = _accuracy(result) - _accuracy(base)
    if math.isnan(gain):
        return format_number(gain)
    return f"{100 * gain:+.1f}" + (", intervals overlap" if _overlap(result, base) else "")


def _tell(column: str, each: Kept, paired: Paired, majority: Majority | None) -> list[str]:
    """Return the warnings of a table: an adapter that ties with its base, and a score that needs no model."""
    run, result = each
    said = []
    base = None if run.is_base else paired.base_of(run, result)
    if base is not None and _overlap(result, base):
        both = f"{format_score(result, 'accuracy')} and {format_score(base, 'accuracy')}"
        said.append(f"{column}: {run.name} and its base tie, as their intervals overlap: {both}.")
    low = result.metrics.get("accuracy_low", _accuracy(result))
    if majority is not None and low <= majority.accuracy:
        said.append(
            f"{column}: {run.name} is not above the majority class: {format_score(result, 'accuracy')}, where always answering "
            f"{majority.label} gives {100 * majority.accuracy:.1f}."
        )
    return said


def _name_unscored(paired: Paired) -> list[str]:
    scored = {run for run, result in paired.kept if result.kind == "evaluation"}
    names = [run.name for run, result in paired.kept if result.kind == "training" and run not in scored]
    return [f"Trained and not evaluated: {', '.join(dict.fromkeys(names))}."] if names else []


def _accuracy(result: Result) -> float:
    return result.metrics.get("accuracy", math.nan)


def _overlap(one: Result, other: Result) -> bool:
    def ends(result: Result) -> tuple[float, float]:
        value = _accuracy(result)
        return result.metrics.get("accuracy_low", value), result.metrics.get("accuracy_high", value)

    (low, high), (other_low, other_high) = ends(one), ends(other)
    return low <= other_high and other_low <= high
