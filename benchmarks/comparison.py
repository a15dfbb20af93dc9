"""Tables and checks of benchmarks/real_tasks.py's results, as Markdown that is readable as plain text."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from finlora.results import Result

ADAPTERS = ("16bit-r4", "8bit-r8", "4bit-r4")
OPTIMIZERS = {"adamw": "AdamW", "zero_one_adam": "0/1 Adam"}
_ABSENT = "not measured"


def render_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table whose columns are aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    cells = (
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
    return f"## {title}\n\n" + "\n".join(cells) + "\n"


def compare_adapters(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """Return a table of each task's base and adapters, scored at their training bits."""
    rows = []
    for task in tasks:
        bases, adapters = _bases(results, task), _adapters(results, task)
        for result in (*bases.values(), *adapters.values()):
            name = f"base, {result.bits} bit" if result.variant == "base" else result.variant
            training = _training_of(results, result)
            rows.append(
                [
                    task,
                    name,
                    f"{result.num_examples:,}{'*' if result.is_partial else ''}",
                    _score(result, "accuracy"),
                    _score(result, "strict_accuracy"),
                    _score(result, "weighted_f1"),
                    _loss(training),
                    _number(training and training.wall_seconds, 0),
                    _number(training and training.peak_memory_gib, 2),
                    _number(training and training.adapter_mib, 2),
                ]
            )
    header = ["task", "model", "test examples", "accuracy %", "strict %", "weighted F1 %", "loss"]
    header += ["wall s", "peak GiB", "adapter MiB"]
    notes = (
        "95 % intervals in brackets. Wall time counts start-up and waiting for a share of a GPU; memory is summed over "
        "workers. * Part of the split.\n"
    )
    return render_table("Base and adapters", header, rows) + "\n" + notes


def compare_optimizers(results: Sequence[Result], tasks: Sequence[str]) -> str:
    """Return a table of AdamW and 0/1 Adam, one row a seed and the mean, with the traffic counts of the training."""
    counted = list(dict.fromkeys(key for r in results if r.kind == "training" for key in _counted(r)))
    rows = []
    for task in tasks:
        for optimizer, title in OPTIMIZERS.items():
            runs = _runs_of(results, task, optimizer)
            for training, evaluation in runs:
                numbers = [_number(_counted(training).get(key), 3) for key in counted]
                seed, workers = training.config["seed"], training.config["train"]["num_workers"]
                accuracy = _score(evaluation, "accuracy") if evaluation else _ABSENT
                curve = " ".join(f"{loss:.3f}" for loss in _quarters(training))
                rows.append([task, title, str(seed), str(workers), accuracy, curve, *numbers])
            scored = [evaluation.metrics["accuracy"] for _, evaluation in runs if evaluation]
            if len(scored) > 1:
                spread = f"{100 * statistics.mean(scored):.1f} ± {100 * statistics.stdev(scored):.1f}"
                quarters = [
                    statistics.mean(column) for column in zip(*(_quarters(run) for run, _ in runs), strict=True)
                ]
                means = [_mean([_counted(run).get(key) for run, _ in runs]) for key in counted]
                curve = " ".join(f"{loss:.3f}" for loss in quarters)
                rows.append([task, title, "mean", "", spread, curve, *means])
    header = ["task", "optimiser", "seed", "workers", "accuracy %", "loss at 1/4 2/4 3/4 4/4 of the run", *counted]
    return render_table("Optimisers, 4bit-r4", header, rows)


def check_adapters(results: Sequence[Result], tasks: Sequence[str]) -> list[str]:
    """Return a line for each claim about the adapters: whether it holds."""
    lines = []
    for task in tasks:
        bases, adapters = _bases(results, task), _adapters(results, task)
        best = max((base.metrics["accuracy_high"] for base in bases.values()), default=None)
        for variant in ADAPTERS:
            adapter, claim = adapters.get(variant), f"{task}: {variant} is above every base (intervals do not overlap)"
            if adapter is None or best is None:
                lines.append(_verdict(claim, None, ""))
                continue
            low = adapter.metrics["accuracy_low"]
            lines.append(_verdict(claim, low > best, f"{100 * low:.1f} against {100 * best:.1f}"))
            share = _majority_share(adapter)
            claim = f"{task}: {variant} is above always answering the commonest label"
            lines.append(_verdict(claim, low > share, f"{100 * low:.1f} against {100 * share:.1f}"))
        for variant in ADAPTERS[1:]:
            full, quantised = adapters.get(ADAPTERS[0]), adapters.get(variant)
            claim = f"{task}: {variant} is inside the 95 % interval of {ADAPTERS[0]}"
            if full is None or quantised is None:
                lines.append(_verdict(claim, None, ""))
                continue
            accuracy, low, high = (
                quantised.metrics["accuracy"],
                full.metrics["accuracy_low"],
                full.metrics["accuracy_high"],
            )
            lines.append(
                _verdict(claim, low <= accuracy <= high, f"{100 * accuracy:.1f} in {100 * low:.1f}-{100 * high:.1f}")
            )
    return lines


def check_optimizers(results: Sequence[Result], tasks: Sequence[str]) -> list[str]:
    """Return a line a task: whether 0/1 Adam's mean accuracy is inside AdamW's mean interval."""
    lines = []
    for task in tasks:
        adamw, zero_one = (
            [evaluation for _, evaluation in _runs_of(results, task, optimizer) if evaluation]
            for optimizer in OPTIMIZERS
        )
        claim = f"{task}: 0/1 Adam's mean accuracy is not below AdamW's mean 95 % interval"
        if not adamw or not zero_one:
            lines.append(_verdict(claim, None, ""))
            continue
        low = statistics.mean(result.metrics["accuracy_low"] for result in adamw)
        accuracy = statistics.mean(result.metrics["accuracy"] for result in zero_one)
        words = f"{100 * accuracy:.1f} against {100 * low:.1f}, {len(zero_one)} and {len(adamw)} seeds"
        lines.append(_verdict(claim, accuracy >= low, words))
    return lines


def plot_optimizers(results: Sequence[Result], tasks: Sequence[str], file: Path) -> bool:
    """Plot the loss of every seed, one panel a task; returns False if there are no losses."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = {(task, name): _runs_of(results, task, name) for task in tasks for name in OPTIMIZERS}
    if not any(curves.values()):
        return False
    figure = Figure(figsize=(6.0 * len(tasks), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for (task, name), runs in curves.items():
        axes = panels[list(tasks).index(task)]
        for number, (training, _) in enumerate(runs):
            steps, losses = zip(*training.loss_curve, strict=True)
            colour = "#0072B2" if name == "adamw" else "#D55E00"
            axes.plot(steps, losses, color=colour, alpha=0.7, label=None if number else OPTIMIZERS[name])
        if runs:
            axes.legend(frameon=False)
        axes.set(title=task, xlabel="optimiser step", ylabel="answer-token loss", yscale="log")
    figure.savefig(file, dpi=130)
    return True


def _bases(results: Sequence[Result], task: str) -> dict[int, Result]:
    found = {r.bits: r for r in results if r.kind == "evaluation" and r.task == task and r.variant == "base"}
    return {bits: found[bits] for bits in sorted(found, reverse=True)}


def _adapters(results: Sequence[Result], task: str) -> dict[str, Result]:
    """Return AdamW's adapters; of several seeds the first, which belongs to the adapters' part."""
    found: dict[str, Result] = {}
    for result in results:
        is_ours = result.kind == "evaluation" and result.task == task and result.variant in ADAPTERS
        if is_ours and result.config["optim"]["name"] == "adamw":
            chosen = found.get(result.variant)
            if chosen is None or result.config["seed"] < chosen.config["seed"]:
                found[result.variant] = result
    return {variant: found[variant] for variant in ADAPTERS if variant in found}


def _runs_of(results: Sequence[Result], task: str, optimizer: str) -> list[tuple[Result, Result | None]]:
    """Return training and evaluation of an optimiser's two-worker 4-bit runs, by seed."""
    runs = []
    for result in results:
        is_kind = result.kind == "training" and result.task == task and result.variant == ADAPTERS[-1]
        if is_kind and result.config["optim"]["name"] == optimizer:
            scored = [r for r in results if r.kind == "evaluation" and r.adapter == result.adapter]
            runs.append((result, scored[-1] if scored else None))
    return sorted(runs, key=lambda run: run[0].config["seed"])


def _training_of(results: Sequence[Result], evaluation: Result) -> Result | None:
    found = [r for r in results if r.kind == "training" and r.adapter == evaluation.adapter]
    return found[-1] if found else None


def _majority_share(result: Result) -> float:
    sizes = [sum(predictions.values()) for predictions in result.counts.values()]
    return max(sizes) / sum(sizes)


def _quarters(training: Result) -> list[float]:
    """Return the loss after each quarter of the run."""
    last = training.loss_curve[-1][0]
    return [
        min(training.loss_curve, key=lambda point: abs(point[0] - last * quarter / 4))[1] for quarter in (1, 2, 3, 4)
    ]


def _counted(training: Result) -> dict[str, float]:
    """Return the largest traffic of a worker, and the smallest seconds: the others' include waiting."""
    keys = training.wire[0] if training.wire else ()
    return {key: (min if "seconds" in key else max)(worker[key] for worker in training.wire) for key in keys}


def _score(result: Result, name: str) -> str:
    value = result.metrics.get(name)
    if value is None:
        return _ABSENT
    low, high = result.metrics.get(f"{name}_low"), result.metrics.get(f"{name}_high")
    bounds = "" if low is None or high is None else f" ({100 * low:.1f}-{100 * high:.1f})"
    return f"{100 * value:.1f}{bounds}"


def _loss(training: Result | None) -> str:
    return f"{training.metrics['loss_first']:.3f} -> {training.metrics['loss_last']:.3f}" if training else ""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{0 if value == int(value) else digits}f}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return _number(statistics.mean(known), 3) if known else ""


def _verdict(claim: str, holds: bool | None, numbers: str) -> str:
    word = {True: "holds", False: "DOES NOT HOLD", None: "not measured"}[holds]
    return f"- {word}: {claim}" + (f" ({numbers})" if numbers else "")
