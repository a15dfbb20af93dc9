"""The paper's numbers beside those of a base that is not the paper's: which way they go, not how large they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean

from finlora.report.comparable import has_random_weights, is_like, is_llama
from finlora.report.pairing import Kept, Paired, Run
from finlora.report.paper import PAPER
from finlora.report.seeds import format_spread
from finlora.report.tables import QUANTITIES, TextTable, format_number
from finlora.results import Result

_SIZE = "8B"
_NOT_KEPT = "not kept here"
"""Where finlora/report/paper.py has no number of the paper."""
_VARIANTS = ("base", "4bit-r4", "8bit-r8", "16bit-r8")
_TRAINED_ON = ("", " (of several tasks)", " (not trained on it)")
"""Mark of an adapter's score by what it was trained on: the task alone, the task among others, other tasks."""


def other_base_tables(paired: Paired) -> list[TextTable]:
    """Return two tables for each base that is none of the paper's, its scores and its costs; none where nothing compares."""
    kept, left_out = (
        _group(paired.kept),
        _group(Kept(each.run, each.result) for each in paired.left_out if not each.is_stale),
    )
    tables = []
    for base, own in kept.items():
        # Memory at batch 1 is measured on a few examples, which a whole test split supersedes as a score.
        tables += [_score_table(base, own), _cost_table(base, own, [*own, *left_out.get(base, ())])]
    return [table for table in tables if table.rows]


def _group(pairs: Iterable[Kept]) -> dict[str, list[Kept]]:
    """Return the measurements of each base that is none of the paper's."""
    bases: dict[str, list[Kept]] = {}
    for each in pairs:
        result = each.result
        if not (is_llama(result, "8B") or is_llama(result, "70B") or has_random_weights(result)):
            bases.setdefault(each.run.base, []).append(each)
    return bases


def _score_table(base: str, own: Sequence[Kept]) -> TextTable:
    """Accuracy and F1 on the paper's tasks, a row for each task and variant that was scored at the paper's 8 bit."""
    trained = {each.run: each.result.task.split("+") for each in own if each.result.kind == "training"}
    paper = {(value.tasks[0], value.variant): value for value in PAPER if value.quantity == "accuracy"}
    rows = []
    for task in dict.fromkeys(task for task, _ in paper):
        for variant in _VARIANTS:
            value = paper.get((task, variant))
            like = value or dataclasses.replace(paper[task, "base"], variant=variant)
            found, mark = _closest(
                task, [each for each in own if is_like(like, each.result, on_any_test=True)], trained
            )
            if found:
                is_papers = all(is_like(like, result) for result in found)
                is_partial = any(result.is_partial for result in found)
                rows.append(
                    (
                        task if is_papers else f"{task} (another test split)",
                        f"{variant}{mark}",
                        _NOT_KEPT if value is None else f"{100 * value.value:.2f}",
                        f"{format_spread(found, 'accuracy')}{'*' if is_partial else ''}",
                        format_spread(found, "weighted_f1") if "weighted_f1" in found[0].metrics else "none",
                        _count_runs(found),
                    )
                )
    notes = ["% at 8 bit: the interval of one run, or mean ± standard deviation of several."]
    if any("*" in row[3] for row in rows):
        notes.append("* Partial: not every example of the prepared test split was scored.")
    return TextTable(
        title=f"Beside the paper's {_SIZE}: scores of {base}",
        header=("task", "variant", f"paper's {_SIZE}: accuracy", "ours: accuracy", "ours: weighted F1", "runs"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def _closest(task: str, found: Sequence[Kept], trained: Mapping[Run, Sequence[str]]) -> tuple[list[Result], str]:
    """Return the scores of the runs whose training is the closest to the task alone, and their mark."""

    def rank(run: Run) -> int:
        tasks = trained.get(run, ())
        if not tasks:  # a base, or an adapter whose training is not among the results
            return 0
        # xbrl_tags and xbrl_values share an adapter in the paper too.
        return 2 if task not in tasks else min(1, len({each.partition("_")[0] for each in tasks}) - 1)

    best = min((rank(each.run) for each in found), default=0)
    return [each.result for each in found if rank(each.run) == best], _TRAINED_ON[best]


def _count_runs(results: Sequence[Result]) -> str:
    return str(len({result.run for result in results}))


def _cost_table(base: str, own: Sequence[Kept], measured: Sequence[Kept]) -> TextTable:
    """Memory, adapter size, GPU-hours and time, a row for each number of the paper's 8B that has one of ours."""
    rows = []
    for value in (value for value in PAPER if value.size == _SIZE and value.quantity != "accuracy"):
        group = measured if value.quantity == "inference_memory_gib" else own
        found = [each.result for each in group if is_like(value, each.result)]
        if found:
            rows.append(
                (
                    QUANTITIES[value.quantity],
                    value.variant or (f"{value.bits} bit" if value.bits else "any"),
                    " / ".join(dict.fromkeys(result.task for result in found)) if value.tasks else "any task",
                    format_number(value.value, 2),
                    format_number(fmean(_MEASURED[value.quantity](result) for result in found), 4),
                    _count_runs(found),
                )
            )
    return TextTable(
        title=f"Beside the paper's {_SIZE}: cost of {base}",
        header=("quantity", "variant", "task", f"paper's {_SIZE}", "ours", "runs"),
        rows=tuple(rows),
        notes=(
            "Means over runs. Paper: 4 x RTX A6000. A run on a share of a GPU counts that share of its hours, and takes longer "
            "than alone: the cost table names the device and the share.",
        ),
    )


_MEASURED: dict[str, Callable[[Result], float]] = {
    "adapter_mib": lambda result: result.adapter_mib or 0.0,
    "inference_memory_gib": lambda result: result.peak_memory_gib or 0.0,
    "training_memory_gib": lambda result: result.peak_memory_gib or 0.0,
    "gpu_hours": lambda result: result.gpu_hours or 0.0,
    "seconds_per_example": lambda result: result.seconds_per_example or 0.0,
}
"""Quantity of a result that has it, as `is_like` asks; it is never the 0 that stands for one without."""
