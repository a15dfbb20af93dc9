"""Outcomes of a reproduction's steps, kept on disk so that finished steps are not repeated. No Ray here.

Layout of OUTPUT:
    steps/NAME.json    one Outcome, written atomically when a step has ended
    runs/              run folders with their results.jsonl
    report/            report.html, report.md and plots of all results
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from finlora.data.sets.prepared import read_prepared
from finlora.durable import seal, unseal, write_whole
from finlora.errors import FinloraError, ResultError
from finlora.model.contract import CONTRACT_FILE
from finlora.model.source import find_source
from finlora.report.tables import TextTable
from finlora.reproduce.paper_rows import Step


class StepState(StrEnum):
    """State of a step, in the words of its record and of the table."""

    DONE = "done"
    CANNOT_RUN = "cannot run"
    WAITS = "waits for its training"
    FAILED = "failed"
    TO_DO = "to do"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """Outcome of a step."""

    name: str
    key: str
    """Step.key: an outcome under other settings does not count."""
    state: StepState
    cause: str = ""
    """Reason why it did not run or failed."""
    seconds: float = 0.0
    """Work; of a training, all its attempts together."""
    waited: float = 0.0
    """Seconds of waiting for GPUs and cores that others hold."""


def write_outcome(output: Path, outcome: Outcome) -> None:
    """Write an outcome atomically."""
    folder = output / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{outcome.name}.json", json.dumps(seal(dataclasses.asdict(outcome)), indent=1))


def read_outcome(output: Path, step: Step) -> Outcome:
    """Return the outcome of a step under its present settings; `to do` where there is none.

    Raises:
        ResultError: the record is damaged.
    """
    path = output / "steps" / f"{step.name}.json"
    if path.is_file():
        try:
            values = unseal(json.loads(path.read_text(encoding="utf-8")))
            outcome = Outcome(state=StepState(values.pop("state")), **values)
        except (ValueError, TypeError, KeyError) as error:
            raise ResultError(
                f"{path} is damaged and no longer says how the step ended ({error}): delete that file to repeat the step."
            ) from error
        is_there = step.kind == "evaluate" or (step.adapter is not None and (step.adapter / CONTRACT_FILE).is_file())
        if outcome.key == step.key and is_there:
            return outcome
    return Outcome(name=step.name, key=step.key, state=StepState.TO_DO)


def find_obstacle(step: Step, found: set[tuple[str, str | None, str]] | None = None) -> str | None:
    """Return why a step cannot run here, from its files alone; None where no obstacle is found.

    Args:
        found: bases whose files were usable before, and are not checked again; this step's is added.
    """
    model, found = step.config.model, set() if found is None else found
    base = (model.base, model.revision, model.weights)
    try:
        if base not in found:
            find_source(model)
            found.add(base)
        for task in step.config.data.tasks:
            read_prepared(Path(step.config.data.dir), task, "train" if step.kind == "train" else "test")
    except FinloraError as error:
        return str(error)
    return None


def lacks_adapter(step: Step) -> bool:
    """Return whether a step scores an adapter that is not trained yet."""
    return step.kind == "evaluate" and step.adapter is not None and not (step.adapter / CONTRACT_FILE).is_file()


def foresee(steps: Sequence[Step], output: Path) -> list[Outcome]:
    """Return the expected outcome of each step without running any."""
    outcomes: list[Outcome] = []
    trainable: set[Path | None] = set()
    bases: set[tuple[str, str | None, str]] = set()
    for step in steps:
        outcome = read_outcome(output, step)
        if outcome.state != StepState.DONE:
            outcome = Outcome(name=step.name, key=step.key, state=StepState.TO_DO)
            if obstacle := find_obstacle(step, bases):
                outcome = dataclasses.replace(outcome, state=StepState.CANNOT_RUN, cause=obstacle)
            elif lacks_adapter(step) and step.adapter not in trainable:
                outcome = dataclasses.replace(outcome, state=StepState.WAITS)
            elif step.kind == "train":
                trainable.add(step.adapter)
        outcomes.append(outcome)
    return outcomes


def outcome_table(outcomes: Sequence[Outcome]) -> TextTable:
    """Return a table with a row for each step that was done or failed; others share a row by state and cause."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for each in outcomes:
        has_own_row = each.state in (StepState.DONE, StepState.FAILED)
        groups.setdefault((each.state, each.cause, each.name if has_own_row else ""), []).append(each)
    counts = Counter(each.state for each in outcomes)
    return TextTable(
        title="Steps of the reproduction",
        header=("step", "state", "seconds", "waited s", "why"),
        rows=tuple(
            (
                "\n".join(each.name for each in group),
                state if len(group) == 1 else f"{state}: {len(group)}",
                *((f"{group[0].seconds:,.0f}", f"{group[0].waited:,.0f}") if state == StepState.DONE else ("", "")),
                cause,
            )
            for (state, cause, _), group in groups.items()
        ),
        notes=(", ".join(f"{counts[state]} {state}" for state in StepState if counts[state]) + ".",),
    )
