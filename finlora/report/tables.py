"""Tables of results, the same on a terminal and in Markdown.

A number that was not measured says so; it is never 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finlora.report.comparable import explain_missing, find_ours
from finlora.report.pairing import Kept, Paired, short
from finlora.report.paper import DIFFERENCES, PAPER, PaperValue
from finlora.results import Result

NOT_MEASURED = "not measured"
NOT_RUN = "not run"
_PAPER_HEADER = ("model", "variant", "task", "quantity", "paper", "ours", "run")
QUANTITIES = {
    "accuracy": "accuracy %",
    "adapter_mib": "adapter, MiB",
    "inference_memory_gib": "memory at batch 1, GiB",
    "training_memory_gib": "training memory, GiB",
    "gpu_hours": "GPU-hours",
    "seconds_per_example": "s/example",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TextTable:
    """A table for rendering; a cell may hold several lines. `notes` are shown below it."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


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
    if math.isnan(low) or math.isnan(high):
        return f"{100 * value:.{digits}f}"
    return format_share(value, low, high, digits)


def format_share(value: float, low: float, high: float, digits: int = 1) -> str:
    """Return a share in per cent with its interval: `86.3 (84.3-88.2)` with an en dash."""
    return f"{100 * value:.{digits}f} ({100 * low:.{digits}f}–{100 * high:.{digits}f})"


def cost_table(paired: Paired) -> TextTable:
    """One row a measurement: adapter size, peak memory, time, speed, and the device where several were used."""
    kept = sorted(paired.kept, key=lambda each: each.result.kind != "training")
    devices = sorted({_name_device(result) for _, result in kept})
    has_one_device = len(devices) == 1
    header: tuple[str, ...] = (
        *("run", "measurement", "adapter MiB", "peak GiB", "s/example", "tokens/s", "run time s", "waited s", "GPU-h"),
    )
    notes = [
        "GiB = 2**30 bytes, summed over workers; on CPU resident memory. Run time: a training's attempts added up, without the "
        "wait for room, which is shown separately. GPU-hours are run time x GPUs, none on CPU."
    ]
    if has_one_device:
        notes.append(f"Device: {devices[0]}.")
    if any(result.is_partial for _, result in kept):
        notes.append("* Partial: not all prepared examples were used.")
    rows = tuple(_cost_row(each) + (() if has_one_device else (_name_device(each.result),)) for each in kept)
    header = header if has_one_device else (*header, "device")
    # A column of nothing but `not measured`, as GPU-hours on a CPU, is a sentence.
    empty = [index for index in range(len(header)) if all(row[index] == NOT_MEASURED for row in rows)]
    if empty:
        notes.append(f"Measured nowhere: {', '.join(header[index] for index in empty)}.")

    def shown(cells: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(cell for index, cell in enumerate(cells) if index not in empty)

    return TextTable(title="Cost", header=shown(header), rows=tuple(map(shown, rows)), notes=tuple(notes))


def _cost_row(each: Kept) -> tuple[str, ...]:
    run, result = each
    times = f" in {result.attempts} attempts" if (result.attempts or 1) > 1 else ""
    return (
        _name_row(each),
        f"{result.task}{'*' if result.is_partial else ''}\n{' '.join(filter(None, (result.kind, result.method)))}{times}",
        "none" if run.is_base else format_number(result.adapter_mib, 2),
        format_number(result.peak_memory_gib, 2),
        format_number(result.seconds_per_example, 4),
        format_number(result.tokens_per_second, 0),
        format_number(result.wall_seconds, 0),
        format_number(result.waited_seconds, 0),
        format_number(result.gpu_hours, 4),
    )


def _name_row(each: Kept) -> str:
    name, model = each.run.row
    return f"{name}\n{model}, {each.result.bits} bit"


def _name_device(result: Result) -> str:
    device, share = result.environment.get("device", "not recorded"), _share_of(result)
    return f"{device}, {share:g} of it" if share < 1 and result.gpu_hours is not None else device


def _share_of(result: Result) -> float:
    """Return the GPUs of a worker or a stage, below 1 where others used the same."""
    name, key = ("train", "gpus_per_worker") if result.kind == "training" else ("eval", "num_gpus")
    section = result.config.get(name)
    share = section.get(key) if isinstance(section, dict) else None
    return float(share) if isinstance(share, int | float) else 1.0


def wire_table(paired: Paired) -> TextTable:
    """One row for each run that counted its traffic: what a worker sent for the optimiser, and what Adam would have sent."""
    return TextTable(
        title="Communication",
        header=("run", "optimiser", "workers", "rounds", "MiB sent", "of Adam's", "wire s", "last loss", "run time s"),
        rows=tuple(_wire_row(each) for each in paired.kept if each.result.wire),
        notes=(
            "MiB = 2**20 bytes and seconds per worker, over the whole run. Of Adam's: share of what a float32 ring all-reduce of "
            "the gradients at each step would have sent.",
            "Wire seconds, smallest and largest over workers: a fast worker's hold its wait for the slowest.",
        ),
    )


def _wire_row(each: Kept) -> tuple[str, ...]:
    run, result = each
    seconds = sorted(worker["seconds"] for worker in result.wire)
    sent, adam = (max(worker[key] for worker in result.wire) for key in ("bytes_sent", "bytes_adam"))
    ends = [format_number(seconds[0], 2), format_number(seconds[-1], 2)]
    return (
        run.name,
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


def left_out_table(paired: Paired, searches: Sequence[Path] = ()) -> TextTable:
    """One row a result that does not count, and one a search, whose trials are not scored on the test split."""
    rows = [
        (
            each.run.name,
            " ".join(filter(None, (each.result.kind, "of", each.result.task, each.result.method))),
            each.result.created or "not recorded",
            each.why,
        )
        for each in paired.left_out
    ]
    rows += [
        (
            f"trials of the search {folder.name}",
            "",
            "",
            f"scored on held-out training examples: `finlora report {folder}`",
        )
        for folder in searches
    ]
    return TextTable(title="Left out", header=("run", "measurement", "made (UTC)", "why"), rows=tuple(rows))


def paper_tables(paired: Paired) -> list[TextTable]:
    """The paper's tables with our comparable measurement, and its run, beside each number that has one.

    What has none is counted in a last table, by the reason.
    """
    usable = [*paired.kept, *(Kept(each.run, each.result) for each in paired.left_out if not each.is_stale)]
    results = [result for _, result in usable]
    runs = {id(result): run for run, result in usable}
    tables, missing = [], []
    for title in dict.fromkeys(value.table for value in PAPER):
        rows, reasons = [], Counter[str]()
        for value in (value for value in PAPER if value.table == title):
            ours = find_ours(value, results)
            if ours is None:
                reasons[explain_missing(value, results)] += 1
            else:
                rows.append(_paper_row(value, ours, runs[id(ours)].name))
        missing += [(title, str(number), reason) for reason, number in reasons.most_common()]
        if rows:
            notes = ("Paper: 4 x RTX A6000, arXiv:2412.11378v2. Ours: on the device that the cost table names.",)
            tables.append(
                TextTable(title=f"Beside the paper: {title}", header=_PAPER_HEADER, rows=tuple(rows), notes=notes)
            )
    if missing:
        header = ("the paper's table", "numbers", "why")
        tables.append(TextTable(title=f"Beside the paper: {NOT_RUN}", header=header, rows=tuple(missing)))
    return tables


def _paper_row(value: PaperValue, ours: Result, run: str) -> tuple[str, ...]:
    digits = 2 if value.quantity in ("accuracy", "gpu_hours") else 1
    return (
        f"Llama 3.1 {value.size}",
        value.variant or (f"{value.bits} bit" if value.bits else "any"),
        " / ".join(value.tasks[:1] if "+" in "".join(value.tasks) else value.tasks) or "any task",
        QUANTITIES[value.quantity],
        f"{100 * value.value if value.quantity == 'accuracy' else value.value:.{digits}f}",
        _our_cell(value, ours),
        run,
    )


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
    """Caveats of a comparison with the paper."""
    return TextTable(title="Where ours may differ from the paper's", header=("of", "what differs"), rows=DIFFERENCES)


def provenance_table(paired: Paired) -> TextTable:
    """One row a measurement: weights, time, data and settings it was made with, and its environment (a letter)."""
    letters = _letter_environments(paired)
    return TextTable(
        title="Where each number comes from",
        header=(
            *("run", "measurement", "made (UTC)", "examples", "base", "adapter", "data", "settings", "environment"),
        ),
        rows=tuple(
            (
                _name_row(each),
                " ".join(filter(None, (result.kind, "of", result.task, result.method))),
                result.created or "not recorded",
                f"{result.num_examples:,}{'*' if result.is_partial else ''}",
                short(run.base_hash),
                "none" if run.is_base else short(run.adapter_hash),
                "+".join(map(short, (result.data_hash or "").split("+"))),
                hashlib.sha256(json.dumps(result.config, sort_keys=True).encode()).hexdigest()[:12],
                letters[_freeze(result.environment)],
            )
            for each in paired.kept
            for run, result in [each]
        ),
        notes=(
            "First 12 digits. Base: fingerprint of its weights; adapter: SHA-256 of adapter_model.safetensors; data and "
            "settings: SHA-256 over the prepared split and the resolved config.",
        ),
    )


def environment_table(paired: Paired) -> TextTable:
    """One column an environment: versions and device."""
    letters = _letter_environments(paired)
    names = list(dict.fromkeys(name for environment in letters for name, _ in environment))
    rows = ((name, *(dict(environment).get(name, "not recorded") for environment in letters)) for name in names)
    return TextTable(title="Environments", header=("", *letters.values()), rows=tuple(rows))


def _letter_environments(paired: Paired) -> dict[tuple[tuple[str, str], ...], str]:
    found = dict.fromkeys(_freeze(result.environment) for _, result in paired.kept)
    return {environment: f"E{number}" for number, environment in enumerate(found, start=1)}


def _freeze(environment: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(environment.items()))
