"""Scoring of a table, from its first row to the written output; the same command resumes it after a crash."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finlora.cluster import connect
from finlora.configfile import config_to_tree
from finlora.durable import hash_file
from finlora.model.base_files import BaseFiles
from finlora.results import describe_environment
from finlora.score.folder import ScoreFolder
from finlora.score.pool import count_engines, find_bundle, score_parts
from finlora.score.score_plan import ScorePlan
from finlora.score.scored_table import write_output
from finlora.score.scorer import plan_cache
from finlora.score.table import Part

OnProgress = Callable[[str, int, int], None]


def run_scoring(
    plan: ScorePlan,
    base: BaseFiles,
    out: Path,
    num_engines: int | None,
    on_progress: OnProgress,
    announce: Callable[[str], None],
) -> dict[str, Any]:
    """Score all parts that are not sealed, write the output, and return its record.

    Args:
        num_engines: actors, each with the whole model; None: as many as fit on the cluster's GPUs, on CPU one.
        on_progress: called with a name, the rows done and their total.
        announce: shows a line while the engines wait for GPUs or cores.

    Raises:
        ConfigError: another scoring wrote the output, or another process is writing it.
        ResourceError: the cluster has too few GPUs or cores.
    """
    folder, table = ScoreFolder(out), plan.table
    if record := folder.find_finished(plan.binding):
        announce(f"{out} is complete: an earlier run wrote it with the same table, adapter and settings.")
        return record
    started = time.perf_counter()
    with folder.locked(plan.binding):
        left = [part for part in table.parts if not folder.is_sealed(part.number)]
        done = table.num_rows - sum(part.num_rows for part in left)
        if left:
            _score(plan, base, out, left, num_engines, done, on_progress, announce)
        write_output(plan, folder)
        seconds = time.perf_counter() - started
        record = {
            "binding": plan.binding,
            "rows": table.num_rows,
            "rows_scored_now": table.num_rows - done,
            "seconds": seconds,
            **count_results(plan, folder),
            "adapter": str(plan.adapter) if plan.adapter else None,
            "config": config_to_tree(plan.config),
            "environment": describe_environment(),
            "output": {path.name: hash_file(path) for path in _list_files(out)},
        }
        folder.finish(record)
    return record


def count_results(plan: ScorePlan, folder: ScoreFolder) -> dict[str, Any]:
    """Return the rows of each label, the number of rows that abstain, and the rows not scored by reason."""
    labels: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    abstained = 0
    for part in plan.table.parts:
        results = folder.read_part(part.number, part.num_rows)
        reasons.update(
            reason.partition(":")[0] for reason in results.column(f"{plan.prefix}_reason").to_pylist() if reason
        )
        if plan.form.choices:
            labels.update(label for label in results.column(f"{plan.prefix}_label").to_pylist() if label is not None)
        if plan.threshold is not None:
            abstained += sum(filter(None, results.column(f"{plan.prefix}_abstained").to_pylist()))
    return {"labels": dict(labels.most_common()), "abstained": abstained, "not_scored": dict(reasons.most_common())}


def _score(
    plan: ScorePlan,
    base: BaseFiles,
    out: Path,
    left: list[Part],
    num_engines: int | None,
    done: int,
    on_progress: OnProgress,
    announce: Callable[[str], None],
) -> None:
    total = plan.table.num_rows
    if done:
        announce(f"{done:,} of {total:,} rows are scored already; scoring the rest.")
    cache_rows = plan_cache(plan, base)
    connect.connect(log_to_driver=False)
    engines = min(count_engines(plan, num_engines), len(left))
    bundle = find_bundle(plan)
    connect.require(engines, bundle["CPU"], bundle.get("GPU", 0.0))

    def count(part: Part) -> None:
        nonlocal done
        done += part.num_rows
        on_progress("rows", done, total)

    score_parts(plan, out, cache_rows, left, engines, count, announce)


def _list_files(out: Path) -> list[Path]:
    return sorted(out.iterdir()) if out.is_dir() else [out]
