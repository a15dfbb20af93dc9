"""How the steps of a reproduction ended, kept so that what is done is not redone. No Ray here.

Layout of OUTPUT:
    steps/NAME.json    one Outcome, written whole when a step has ended
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
    """How a step stands, in the words of its record and of the table."""

    DONE = "done"
    CANNOT_RUN = "cannot run"
    WAITS = "waits for its training"
    FAILED = "failed"
    TO_DO = "to do"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a step ended."""

    name: str
    key: str
    """Step.key: an outcome of other settings does not count."""
    state: StepState
    cause: str = ""
    """Why it did not run or failed."""
    seconds: float = 0.0
    """At work; of a training, all its attempts together."""
    waited: float = 0.0
    """Seconds of waiting for GPUs and cores that others held."""


def write_outcome(output: Path, outcome: Outcome) -> None:
    """Write an outcome as a whole."""
    folder = output / "steps"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / f"{outcome.name}.json", json.dumps(seal(dataclasses.asdict(outcome)), indent=1))


def read_outcome(output: Path, step: Step) -> Outcome:
    """Return how a step ended with its present settings; `to do` where it has not.

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
                f"{path} does not say any more how the step ended ({error}): delete that file to do the step again."
            ) from error
        is_there = step.kind == "evaluate" or (step.adapter is not None and (step.adapter / CONTRACT_FILE).is_file())
        if outcome.key == step.key and is_there:
            return outcome
    return Outcome(name=step.name, key=step.key, state=StepState.TO_DO)


def find_obstacle(step: Step) -> str | None:
    """Return why a step cannot run here, as far as files tell, without taking a GPU; None where nothing stands in its way."""
    try:
        find_source(step.config.model)
        for task in step.config.data.tasks:
            read_prepared(Path(step.config.data.dir), task, "train" if step.kind == "train" else "test")
    except FinloraError as error:
        return str(error)
    return None


def lacks_adapter(step: Step) -> bool:
    """Return whether a step scores an adapter that is not trained."""
    return step.kind == "evaluate" and step.adapter is not None and not (step.adapter / CONTRACT_FILE).is_file()


def foresee(steps: Sequence[Step], output: Path) -> list[Outcome]:
    """Return the state of each step and what would happen to it, without running any."""
    outcomes: list[Outcome] = []
    trainable: set[Path | None] = set()
    for step in steps:
        outcome = read_outcome(output, step)
        if outcome.state != StepState.DONE:
            outcome = Outcome(name=step.name, key=step.key, state=StepState.TO_DO)
            if obstacle := find_obstacle(step):
                outcome = dataclasses.replace(outcome, state=StepState.CANNOT_RUN, cause=obstacle)
            elif lacks_adapter(step) and step.adapter not in trainable:
                outcome = dataclasses.replace(outcome, state=StepState.WAITS)
            elif step.kind == "train":
                trainable.add(step.adapter)
        outcomes.append(outcome)
    return outcomes


def outcome_table(outcomes: Sequence[Outcome]) -> TextTable:
    """One row a step that was done or failed; those of one state and cause that did not run share a row."""
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
