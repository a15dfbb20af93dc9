"""Scores over seeds: the runs of one row, NAME-seed0, NAME-seed1 and so on, with the mean and the spread of their scores."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev

from finlora.report.pairing import Kept, Paired
from finlora.report.scores import name_column
from finlora.report.tables import NOT_MEASURED, TextTable, format_score
from finlora.results import Result


def seed_table(paired: Paired) -> TextTable:
    """One row for each task and adapter that several seeds trained: mean and standard deviation, then each run."""
    evaluations = [each for each in paired.kept if each.result.kind == "evaluation"]
    columns = [result for _, result in evaluations]
    rows = []
    for group in group_by_seed(evaluations):
        (run, result), scored = group[0], [each.result for each in group]
        if len(group) > 1:
            rows.append(
                (
                    name_column(result, columns),
                    f"{strip_seed(run.name)}\n{run.base}",
                    str(result.bits),
                    format_spread(scored, "accuracy"),
                    format_spread(scored, "weighted_f1"),
                    "\n".join(f"{_seed_of(each)}: {format_score(each.result, 'accuracy')}" for each in group),
                )
            )
    return TextTable(
        title="Over seeds",
        header=("task", "run", "bits", "accuracy", "weighted F1", "accuracy of each seed"),
        rows=tuple(rows),
        notes=(
            "% as mean ± standard deviation over seeds (n - 1): the spread of training. The interval of each seed is that of the "
            "test questions.",
        ),
    )


def group_by_seed(kept: Sequence[Kept]) -> list[list[Kept]]:
    """Return the measurements of adapters, those of one row together, by seed, in order of first appearance."""
    groups: dict[Hashable, list[Kept]] = {}
    for each in kept:
        run, result = each
        if not run.is_base:
            key = (run.base, run.base_hash, strip_seed(run.name), result.kind, result.task, result.bits, result.method)
            groups.setdefault(key, []).append(each)
    return [sorted(group, key=_seed_of) for group in groups.values()]


def format_spread(results: Sequence[Result], name: str, digits: int = 1) -> str:
    """Return a score's mean over several results in per cent, `82.1 ± 0.4`; of a single one its value with interval."""
    if len(results) == 1:
        return format_score(results[0], name, digits)
    if name == "weighted_f1" and not any(name in result.metrics for result in results):
        return "none"  # free text has no classes
    values = [100 * result.metrics.get(name, math.nan) for result in results]
    if any(math.isnan(value) for value in values):
        return NOT_MEASURED
    return f"{fmean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def strip_seed(name: str) -> str:
    """Return a run's name without its seed."""
    return re.sub(r"-seed\d+$", "", name)


def _seed_of(each: Kept) -> int:
    found = re.search(r"-seed(\d+)$", each.run.name)
    return int(found[1]) if found else -1
