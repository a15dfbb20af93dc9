"""Table of beside_peft.py's rows, in Markdown, with a verdict on each accuracy."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from comparison import render_table

from finlora.reproduce.public_rows import TASKS, VARIANTS

SIDES = ("finlora", "plain")
_TITLES = {"finlora": "FinLoRA", "plain": "PEFT"}
_HEADER = (
    *("task", "adapter", "seed", "side", "test", "accuracy % (95 %)", "in the other's", "start-up s", "training s"),
    *("evaluation s", "scoring s", "whole s", "GiB", "at once", "Ray"),
)
NOTES = (
    "`in the other's`: whether the accuracy lies in the other side's 95 % interval. Start-up: from the start of the training's\n"
    "process to the end of its first step; training: from there until the adapter is written; evaluation: its whole process;\n"
    "scoring: the part of it after loading; whole: both processes. GiB: the training's peak, as torch counts allocations (on a\n"
    "CPU the process's memory). At once: processes that shared the machine. Ray: `own` is started in FinLoRA's start-up.\n"
)


def has_failed(record: dict[str, Any]) -> bool:
    """Return whether a side of a row has an error instead of numbers."""
    return any("error" in record[side] for side in SIDES)


def is_within(value: float, score: dict[str, float]) -> bool:
    """Return whether an accuracy lies in the interval of a score; the bounds belong to it."""
    return score["low"] <= value <= score["high"]


def render_rows(records: Sequence[dict[str, Any]]) -> str:
    """Return the table of all rows that both sides have finished, and the verdicts below it."""
    records = sorted(records, key=_order)
    good = [record for record in records if not has_failed(record)]
    changed = list(dict.fromkeys(" ".join(record["settings"]) for record in records if record["settings"]))
    lines: list[list[str]] = []
    outside: list[str] = []
    num_values = 0
    for record in good:
        for task in record["finlora"]["scores"]:
            scores = {side: record[side]["scores"][task] for side in SIDES}
            for side, other in zip(SIDES, SIDES[::-1], strict=True):
                score, num_values = scores[side], num_values + 1
                verdict = is_within(score["accuracy"], scores[other])
                if not verdict:
                    own, theirs = (f"{_TITLES[each]}'s {_show(scores[each])}" for each in (side, other))
                    outside.append(
                        f"- OUTSIDE: {task} {record['variant']} seed {record['seed']}: {own} is not in {theirs}"
                    )
                mark = f" [{changed.index(' '.join(record['settings'])) + 1}]" if record["settings"] else ""
                lines.append(_line(record, task + mark, scores[side], side, "yes" if verdict else "NO"))
    parts = [render_table("FinLoRA beside transformers + PEFT + bitsandbytes", _HEADER, lines), NOTES]
    parts += [f"[{number}] with {words}" for number, words in enumerate(changed, start=1)]
    if num_values:
        parts.append(f"{num_values - len(outside)} of {num_values} accuracies lie in the other side's 95 % interval.")
        parts += outside
        parts += [_compare_times(good, key, words) for key, words in _TIMES.items()]
    parts += [
        f"- not measured: {record['task']} {record['variant']} seed {record['seed']}, {_TITLES[side]}: {record[side]['error']}"
        for record in records
        for side in SIDES
        if "error" in record[side]
    ]
    return "\n".join(parts) + "\n"


_TIMES = {
    "start_up_s": "Start-up",
    "training_s": "Training after its first step",
    "evaluate_wall_s": "Evaluation, whole process",
    "wall_s": "Both processes, whole",
}


def _compare_times(records: Sequence[dict[str, Any]], key: str, words: str) -> str:
    """Return a line with PEFT's time over FinLoRA's, by rows."""
    ratios = sorted(record["plain"][key] / record["finlora"][key] for record in records)
    ends = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(ratios) > 1 else ""
    return f"{words}: PEFT takes {statistics.median(ratios):.2f} times as long as FinLoRA{ends}."


def _order(record: dict[str, Any]) -> tuple[int, int, int, str]:
    """Return a row's position: by task, precision, seed and settings."""
    variants = [f"{bits}bit-r{rank}" for bits, rank in VARIANTS]
    return TASKS.index(record["task"]), variants.index(record["variant"]), record["seed"], str(record["settings"])


def _line(record: dict[str, Any], task: str, score: dict[str, float], side: str, verdict: str) -> list[str]:
    own = record[side]
    names = [task, record["variant"], str(record["seed"]), _TITLES[side]]
    keys = ("start_up_s", "training_s", "evaluate_wall_s", "scoring_s", "wall_s")
    numbers = [
        *(f"{own[key]:.1f}" for key in keys),
        f"{own['train_peak_gib']:.2f}",
        str(record["at_once"]),
        record["ray"],
    ]
    if score is not next(iter(own["scores"].values())):  # a later task of the same adapter shares its times
        numbers = [""] * len(numbers)
    return [*names, f"{score['num_examples']:,}", _show(score), verdict, *numbers]


def _show(score: dict[str, float]) -> str:
    return f"{100 * score['accuracy']:.1f} ({100 * score['low']:.1f}-{100 * score['high']:.1f})"
