"""Pareto front of a search, its table, its plot and the configs of its best trials. No Ray here."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.config import RunConfig
from finlora.configfile import save_config
from finlora.errors import FinloraError
from finlora.report.tables import TextTable, format_number
from finlora.report.write import draw_table, render_markdown
from finlora.train.search.search_folder import SearchFolder, TrialRecord, TrialState, best_config
from finlora.train.search.space import LARGER_IS_BETTER, Objective, SearchConfig, Trial

if TYPE_CHECKING:
    from rich.console import Console

_LEAST_DRAWN = 2
NAMES: dict[str, str] = {
    "accuracy": "accuracy %",
    "weighted_f1": "weighted F1 %",
    "strict_accuracy": "strict accuracy %",
    "numeric_accuracy": "within 1 %, %",
    "peak_memory_gib": "peak GiB",
    "hours": "GPU-hours",
}


def pareto_front(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> list[TrialRecord]:
    """Return the finished trials that no other finished trial dominates: as good in all objectives and better in one.

    Trials without a value for an objective are left out. Equal trials all stay.
    """
    points = [(record, _point(record, objectives)) for record in records if record.state == TrialState.FINISHED]
    known = [(record, point) for record, point in points if not any(map(math.isnan, point))]
    return [
        record
        for record, point in known
        if not any(all(a >= b for a, b in zip(other, point, strict=True)) and other != point for _, other in known)
    ]


def measured(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> tuple[Objective, ...]:
    """Return the objectives that any trial has a value for: free text has no weighted F1."""
    return tuple(name for name in objectives if any(name in record.scores for record in records))


def best_trial(records: Sequence[TrialRecord], objectives: Sequence[Objective]) -> TrialRecord | None:
    """Return the finished trial that is best in the first measured objective; of equal ones, in the next, and so on.

    A trial without a value for an objective comes after those with one.
    """
    objectives = measured(records, objectives)

    def key(record: TrialRecord) -> list[float]:
        return [-math.inf if math.isnan(value) else value for value in _point(record, objectives)]

    return max((record for record in records if record.state == TrialState.FINISHED), key=key, default=None)


def front_table(records: Sequence[TrialRecord], objectives: Sequence[Objective], *, on_gpu: bool) -> TextTable:
    """Return a table with a row for each trial: the front, other finished trials, pruned ones, failed ones."""
    objectives = measured(records, objectives)
    front, best = pareto_front(records, objectives), best_trial(records, objectives)
    order = list(TrialState)

    def rank(record: TrialRecord) -> tuple[int, bool, list[float]]:
        return order.index(record.state), record not in front, [-value for value in _point(record, objectives)]

    all_of = {"alpha": lambda trial: f"{trial.alpha:g}", "targets": _name_targets}
    varied = {name: value for name, value in all_of.items() if len({value(r.trial) for r in records}) > 1}
    names = [NAMES[name] if on_gpu or name != "hours" else "worker-hours" for name in objectives]
    rows = tuple(
        (
            record.trial.name,
            f"{record.trial.learning_rate:.2e}",
            *(value(record.trial) for value in varied.values()),
            _describe_state(record, front, best),
            f"{record.step:,} / {record.total_steps:,}",
            format_number(record.held_out_loss, 4),
            *(_format(record, name) for name in objectives),
        )
        for record in sorted(records, key=rank)
    )
    counts = Counter(record.state for record in records)
    single = ("One trial finished: there is nothing to compare it with, so no front is drawn.",)
    seconds = sum(record.seconds for record in records)
    steps, all_steps = (sum(getattr(r, name) for r in records) for name in ("step", "total_steps"))
    saved = f", {100 * (1 - steps / all_steps):.0f} % of all steps saved by ASHA" if counts[TrialState.PRUNED] else ""
    failed = [f"{record.trial.name} failed. {record.cause}" for record in records if record.state == TrialState.FAILED]
    notes = (
        *failed,
        *(single if counts[TrialState.FINISHED] == 1 else ()),
        f"{', '.join(f'{number} {state}' for state, number in counts.items())}; {seconds:,.0f} s of trials in all{saved}.",
        "Scores on training examples held out from every trial; the test split was not used. Front: no other finished "
        "trial is as good in every objective and better in one. Pruned: stopped by ASHA for a higher held-out loss than "
        "other trials after as many steps.",
    )
    header = ("trial", "learning rate", *varied, "state", "steps", "held-out loss", *names)
    return TextTable(title="Trials", header=header, rows=rows, notes=notes)


def draw_front(records: Sequence[TrialRecord], objectives: Sequence[Objective], path: Path, *, on_gpu: bool) -> bool:
    """Plot the first objective over each cost, with the front of the two as a line.

    Returns:
        False where nothing was drawn: no cost was measured, or fewer than two trials finished.
    """
    from finlora.report.plots import COLOURS, GREY, new_figures, save_figure

    objectives = measured(records, objectives)
    finished = [record for record in records if record.state == TrialState.FINISHED]
    costs = [name for name in objectives if name not in LARGER_IS_BETTER]
    if len(finished) < _LEAST_DRAWN or not costs:
        return False
    goal = objectives[0]
    figure, all_axes = new_figures(len(costs), 5.6 * len(costs), 4.6)
    front = pareto_front(records, objectives)
    for axes, cost in zip(all_axes, costs, strict=True):
        for bits in sorted({record.trial.bits for record in finished}):
            own = [record for record in finished if record.trial.bits == bits]
            axes.scatter(
                [record.scores[cost] for record in own],
                [100 * record.scores[goal] for record in own],
                s=[28 + 7 * record.trial.rank for record in own],
                color=COLOURS[{16: 2, 8: 1, 4: 0}[bits]],
                label=f"{bits} bit",
                alpha=0.85,
                zorder=3,
            )
        line = sorted(pareto_front(finished, (goal, cost)), key=lambda record: record.scores[cost])
        axes.step(
            [record.scores[cost] for record in line],
            [100 * record.scores[goal] for record in line],
            where="post",
            color=GREY,
            linewidth=1.4,
            label="front of these two",
        )
        for record in front:
            at = (record.scores[cost], 100 * record.scores[goal])
            axes.annotate(record.trial.name.partition("-")[0], at, (5, 5), textcoords="offset points", fontsize=8.5)
        axes.set_xlabel(NAMES[cost] if on_gpu or cost != "hours" else "worker-hours", fontsize=12)
        axes.locator_params(axis="x", nbins=5)
        axes.grid(color="#DDDDDD")
    all_axes[0].set_ylabel(NAMES[goal], fontsize=12)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=10, frameon=False)
    figure.supxlabel("size: rank; numbers: trials on the front of all objectives", fontsize=9, x=0.99, ha="right")
    save_figure(figure, path)
    return True


def write_summary(
    config: RunConfig, search: SearchConfig, folder: SearchFolder, records: Sequence[TrialRecord], console: Console
) -> list[Path]:
    """Print the table of a search and write its report files.

    Returns:
        The files: front.md, front.png where two trials finished, best.yaml where one did, a config for each trial of the front.

    Raises:
        FinloraError: no trial finished; names the causes.
    """
    on_gpu = config.train.device == "cuda"
    table = front_table(records, search.objectives, on_gpu=on_gpu)
    table = dataclasses.replace(table, notes=(*table.notes, *_tell_limits(config)))
    draw_table(table, console)
    plot = folder.root / "front.png"
    is_drawn = draw_front(records, search.objectives, plot, on_gpu=on_gpu)
    if not is_drawn:
        plot.unlink(missing_ok=True)  # of an earlier end of this search
    plots = [plot] if is_drawn else []
    text = folder.root / "front.md"
    text.write_text(render_markdown(f"Search {config.name}", [table], plots), encoding="utf-8")
    best = best_trial(records, search.objectives)
    if best is None:
        causes = Counter(record.cause for record in records if record.state == TrialState.FAILED)
        worst = "; ".join(f"{number} x {cause}" for cause, number in causes.most_common(3))
        raise FinloraError(
            f"none of {len(records)} trials finished: {worst or 'all were pruned'}. {text} lists them; remove the cause and "
            "start the same command with search.retry_failed=true."
        )
    paths = [text, *plots, folder.best]
    save_config(best_config(config, best.trial), folder.best)
    for record in pareto_front(records, measured(records, search.objectives)):
        paths.append(folder.root / "front" / f"{record.trial.name}.yaml")
        own = best_config(config, record.trial)
        save_config(dataclasses.replace(own, name=f"{config.name}-{record.trial.name}"), paths[-1])
    shutil.rmtree(folder.cache, ignore_errors=True)  # as large as a base, and quick to make again
    return paths


def _tell_limits(config: RunConfig) -> list[str]:
    """Return a note on a search over part of the examples: which limits best.yaml keeps and which it drops."""
    limit, max_steps = config.data.max_train_examples, config.train.max_steps
    if limit is None:
        return []
    kept = "" if max_steps is None else f" Its train.max_steps={max_steps} is taken over."
    return [
        f"The search was limited to {limit:,} training examples; best.yaml and the configs of the front are not: they train on "
        f"the whole training split.{kept}"
    ]


def _point(record: TrialRecord, objectives: Sequence[Objective]) -> list[float]:
    """Return a trial's values, negated where smaller is better."""
    values = ((name, record.scores.get(name, math.nan)) for name in objectives)
    return [value if name in LARGER_IS_BETTER else -value for name, value in values]


def _name_targets(trial: Trial) -> str:
    return "+".join(name.removesuffix("_proj") for name in trial.target_modules)


def _describe_state(record: TrialRecord, front: Sequence[TrialRecord], best: TrialRecord | None) -> str:
    if record.state != TrialState.FINISHED:
        return record.state
    marks = [*(["best"] if record is best else []), *(["front"] if record in front else [])]
    return ", ".join([record.state, *marks])


def _format(record: TrialRecord, name: str) -> str:
    value = record.scores.get(name)
    if value is None:
        return "not measured"
    return (
        format_number(100 * value, 1) if name in LARGER_IS_BETTER else format_number(value, 2 if name != "hours" else 4)
    )
