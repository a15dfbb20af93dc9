"""Results -> tables of text, drawn alike on a terminal and in Markdown.

A number nobody measured says so; it is never 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from finlora.comparable import explain_missing, find_ours, has_random_weights
from finlora.paper import DIFFERENCES, PAPER, PaperValue
from finlora.results import Result

NOT_MEASURED = "not measured"
NOT_RUN = "not run"
_QUANTITIES = {
    "accuracy": "accuracy %",
    "adapter_mib": "adapter, MiB",
    "inference_memory_gib": "memory at batch 1, GiB",
    "training_memory_gib": "training memory, GiB",
    "gpu_hours": "GPU-hours",
    "seconds_per_example": "s/example",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table ready to draw; a cell may hold several lines. `notes` stand below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def select_newest(results: Sequence[Result]) -> list[Result]:
    """Keep the newest Result per (kind, base, variant, task, bits, method), in order of first appearance.

    Measurements of random weights are kept apart from those of pretrained ones. Equal times: the later line wins.
    """
    newest: dict[tuple[object, ...], Result] = {}
    for result in results:
        method = result.method if result.kind == "evaluation" else None
        key = (result.kind, name_base(result), result.variant, result.task, result.bits, method)
        if key not in newest or result.created >= newest[key].created:
            newest[key] = result
    return list(newest.values())


def name_base(result: Result) -> str:
    """Return the base's short name: the last part of a hub id or folder, with a mark for random weights."""
    name = result.base.rstrip("/").rpartition("/")[2] or result.base
    return f"{name} (random weights)" if has_random_weights(result) else name


def format_number(value: float | None, digits: int = 1) -> str:
    """Return the number with thousands commas, `not measured` for None, `NaN` for nan."""
    if value is None:
        return NOT_MEASURED
    return "NaN" if math.isnan(value) else f"{value:,.{digits}f}"


def format_score(result: Result, name: str, digits: int = 1) -> str:
    """Return a score in per cent with its interval: `86.3 (84.3-88.2)` with an en dash; `not measured` without it."""
    value = result.metrics.get(name)
    if value is None or math.isnan(value):
        return format_number(value)
    low, high = result.metrics.get(f"{name}_low", math.nan), result.metrics.get(f"{name}_high", math.nan)
    bounds = "" if math.isnan(low) or math.isnan(high) else f" ({100 * low:.{digits}f}–{100 * high:.{digits}f})"
    return f"{100 * value:.{digits}f}{bounds}"


def score_table(results: Sequence[Result]) -> TextTable:
    """Rows (base, variant, bits), columns tasks: accuracy with interval, weighted F1 and strict accuracy in a cell."""
    evaluations = [result for result in select_newest(results) if result.kind == "evaluation"]
    columns = list(dict.fromkeys(name_column(result, evaluations) for result in evaluations))
    rows: dict[tuple[str, str, int], dict[str, Result]] = {}
    for result in sorted(evaluations, key=lambda result: (name_base(result), result.variant != "base", result.variant)):
        row = rows.setdefault((name_base(result), result.variant, result.bits), {})
        row[name_column(result, evaluations)] = result
    notes = [
        "% with 95 % interval; first accuracy (the answer contains the truth), then weighted F1 (of labels), strict accuracy."
    ]
    if any("numeric_accuracy" in result.metrics for result in evaluations):
        notes.append(
            "Within 1 %: of the questions whose answer is a number, the share answered to one part in a hundred."
        )
    if any(result.is_partial for result in evaluations):
        notes.append("* Partial: not every example of the prepared test split was scored.")
    return TextTable(
        title="Evaluation",
        header=("base", "variant", "bits", *columns),
        rows=tuple(
            (base, variant, str(bits), *(_score_cell(row.get(column)) for column in columns))
            for (base, variant, bits), row in rows.items()
        ),
        notes=tuple(notes),
    )


def name_column(result: Result, evaluations: Sequence[Result]) -> str:
    """Return the task, with the method behind it only where the task was scored by several."""
    methods = {other.method for other in evaluations if other.task == result.task}
    return result.task if len(methods) == 1 else f"{result.task} ({result.method or 'method unknown'})"


def _score_cell(result: Result | None) -> str:
    if result is None:
        return NOT_RUN
    mark = "*" if result.is_partial else ""
    lines = [f"{format_score(result, 'accuracy')}{mark}"]
    if "weighted_f1" in result.metrics or "accuracy" not in result.metrics:  # free text has no classes
        lines.append(f"F1 {format_score(result, 'weighted_f1')}")
    lines.append(f"strict {format_score(result, 'strict_accuracy')}")
    if "numeric_accuracy" in result.metrics:
        lines.append(f"within 1 % {format_score(result, 'numeric_accuracy')}")
    return "\n".join(lines)


def cost_table(results: Sequence[Result]) -> TextTable:
    """One row a measurement: adapter size, peak memory, time, speed, and the device where several were used."""
    newest = sorted(select_newest(results), key=lambda result: (result.kind != "training", name_base(result)))
    devices = sorted({_name_device(result) for result in newest})
    has_one_device = len(devices) == 1
    header = ("model", "measurement", "adapter MiB", "peak GiB", "s/example", "tokens/s", "GPU-h")
    notes = [
        "GiB = 2**30 bytes, summed over workers; on CPU resident memory. GPU-hours are wall time x GPUs, none on CPU."
    ]
    if has_one_device:
        notes.append(f"Device: {devices[0]}.")
    if any(result.is_partial for result in newest):
        notes.append("* Partial: not all prepared examples were used.")
    return TextTable(
        title="Cost",
        header=header if has_one_device else (*header, "device"),
        rows=tuple(_cost_row(result) + (() if has_one_device else (_name_device(result),)) for result in newest),
        notes=tuple(notes),
    )


def _cost_row(result: Result) -> tuple[str, ...]:
    return (
        f"{name_base(result)}\n{result.variant}, {result.bits} bit",
        f"{result.task}{'*' if result.is_partial else ''}\n{' '.join(filter(None, (result.kind, result.method)))}",
        "none" if result.variant == "base" else format_number(result.adapter_mib, 2),
        format_number(result.peak_memory_gib, 2),
        format_number(result.seconds_per_example, 4),
        format_number(result.tokens_per_second, 0),
        format_number(result.gpu_hours, 4),
    )


def _name_device(result: Result) -> str:
    return result.environment.get("device", "not recorded")


def wire_table(results: Sequence[Result]) -> TextTable:
    """One row a run that counted its traffic: what a worker sent for the optimiser, and what Adam would have sent."""
    newest: dict[tuple[object, ...], Result] = {}
    for result in results:
        # Runs that differ in the optimiser alone have one variant, so the run's own name keeps them apart.
        key = (name_base(result), result.config.get("name"), result.task, _name_optimizer(result))
        if result.wire and (key not in newest or result.created >= newest[key].created):
            newest[key] = result
    return TextTable(
        title="Communication",
        header=("run", "optimiser", "workers", "rounds", "MiB sent", "of Adam's", "wire s", "last loss", "wall s"),
        rows=tuple(map(_wire_row, newest.values())),
        notes=(
            "MiB = 2**20 bytes and seconds a worker, over the whole run. Of Adam's: share of what a float32 ring all-reduce of "
            "the gradients at each step would have sent.",
            "Wire seconds, smallest and largest over workers: a fast worker's hold its wait for the slowest.",
        ),
    )


def _wire_row(result: Result) -> tuple[str, ...]:
    seconds = sorted(worker["seconds"] for worker in result.wire)
    sent, adam = (max(worker[key] for worker in result.wire) for key in ("bytes_sent", "bytes_adam"))
    ends = [format_number(seconds[0], 2), format_number(seconds[-1], 2)]
    return (
        str(result.config.get("name", NOT_MEASURED)),
        _name_optimizer(result),
        str(len(result.wire)),
        format_number(max(worker["rounds"] for worker in result.wire), 0),
        format_number(sent / 2**20, 2),
        f"{100 * sent / adam:.1f} %" if adam else "none sent",
        "–".join(dict.fromkeys(ends)),
        format_number(result.metrics.get("loss_last"), 4),
        format_number(result.wall_seconds, 0),
    )


def _name_optimizer(result: Result) -> str:
    section = result.config.get("optim")
    return str(section.get("name", NOT_MEASURED)) if isinstance(section, dict) else NOT_MEASURED


def paper_tables(results: Sequence[Result]) -> list[TextTable]:
    """The paper's tables with our comparable measurement beside each number; where there is none, `not run` and why."""
    tables = []
    for title in dict.fromkeys(value.table for value in PAPER):
        rows = []
        for value in (value for value in PAPER if value.table == title):
            ours = find_ours(value, results)
            what = " / ".join(value.tasks[:1] if "+" in "".join(value.tasks) else value.tasks) or "any task"
            rows.append(
                (
                    f"Llama 3.1 {value.size}",
                    value.variant or (f"{value.bits} bit" if value.bits else "any"),
                    what,
                    _QUANTITIES[value.quantity],
                    f"{100 * value.value:.2f}"
                    if value.quantity == "accuracy"
                    else f"{value.value:.{2 if value.quantity == 'gpu_hours' else 1}f}",
                    f"{NOT_RUN}: {explain_missing(value, results)}" if ours is None else _our_cell(value, ours),
                )
            )
        notes = ("Paper: 4 x RTX A6000, arXiv:2412.11378v2. Ours: on the device that the cost table names.",)
        header = ("model", "variant", "task", "quantity", "paper", "ours")
        tables.append(TextTable(title=f"Beside the paper: {title}", header=header, rows=tuple(rows), notes=notes))
    return tables


def _our_cell(value: PaperValue, ours: Result) -> str:
    measured = {
        "adapter_mib": ours.adapter_mib,
        "inference_memory_gib": ours.peak_memory_gib,
        "training_memory_gib": ours.peak_memory_gib,
        "gpu_hours": ours.gpu_hours,
        "seconds_per_example": ours.seconds_per_example,
    }
    mark = "*" if ours.is_partial and value.quantity != "adapter_mib" else ""
    device = ours.environment.get("device")
    where = f" ({device})" if device and value.quantity in ("gpu_hours", "seconds_per_example") else ""
    number = (
        format_score(ours, "accuracy", 2)
        if value.quantity == "accuracy"
        else format_number(measured[value.quantity], 2)
    )
    return f"{number}{mark}{where}"


def differences_table() -> TextTable:
    """What to know before ours is held against the paper's."""
    return TextTable(title="Where ours may differ from the paper's", header=("of", "what differs"), rows=DIFFERENCES)


def provenance_table(results: Sequence[Result]) -> TextTable:
    """One row a measurement: when it was made, on which data, by which settings and in which environment (a letter)."""
    newest = select_newest(results)
    letters = _letter_environments(newest)
    return TextTable(
        title="Where each number comes from",
        header=("model", "measurement", "made (UTC)", "examples", "data", "settings", "environment"),
        rows=tuple(
            (
                f"{name_base(result)}, {result.variant}, {result.bits} bit",
                " ".join(filter(None, (result.kind, "of", result.task, result.method))),
                result.created or "not recorded",
                f"{result.num_examples:,}{'*' if result.is_partial else ''}",
                "+".join(part[:12] for part in (result.data_hash or "not recorded").split("+")),
                hashlib.sha256(json.dumps(result.config, sort_keys=True).encode()).hexdigest()[:12],
                letters[_freeze(result.environment)],
            )
            for result in newest
        ),
        notes=("Data and settings: first 12 digits of SHA-256 over the prepared split and the resolved config.",),
    )


def environment_table(results: Sequence[Result]) -> TextTable:
    """One column an environment: versions and device."""
    letters = _letter_environments(select_newest(results))
    names = list(dict.fromkeys(name for environment in letters for name, _ in environment))
    rows = ((name, *(dict(environment).get(name, "not recorded") for environment in letters)) for name in names)
    return TextTable(title="Environments", header=("", *letters.values()), rows=tuple(rows))


def _letter_environments(results: Sequence[Result]) -> dict[tuple[tuple[str, str], ...], str]:
    found = dict.fromkeys(_freeze(result.environment) for result in results)
    return {environment: f"E{number}" for number, environment in enumerate(found, start=1)}


def _freeze(environment: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(environment.items()))
