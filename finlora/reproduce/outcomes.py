"""Outcomes of a reproduction's steps, kept on disk so that finished steps are not repeated. No Ray here.

Layout of OUTPUT:
    steps/NAME.json    one Outcome, written atomically when a step has ended
    steps/NAME.log     what the step said when it last ran
    runs/              run folders with their results.jsonl
    report/            report.html, report.md and plots of all results
    lock               locked by the command while it runs
    stop               empty; a signal's name in it asks the command to stop

The outcomes and the results.jsonl are enough to go on elsewhere: a training whose adapter was scored needs no adapter any more.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

from finlora.data.sets.prepared import read_prepared
from finlora.durable import seal, unseal, write_whole
from finlora.errors import FinloraError, ResultError
from finlora.model.contract import CONTRACT_FILE
from finlora.model.source import find_source
from finlora.report.tables import TextTable
from finlora.reproduce.step import Step


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
    """Reason why it did not run, stopped or failed."""
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
    """Return the recorded outcome of a step under its present settings; `to do` where there is none.

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
        if outcome.key == step.key:
            return outcome
    return to_do(step)


def read_outcomes(output: Path, steps: Sequence[Step]) -> dict[str, Outcome]:
    """Return the outcome of each step by name. A training is to do again if an evaluation still needs its lost adapter.

    Raises:
        ResultError: as `read_outcome`.
    """
    found = {step.name: read_outcome(output, step) for step in steps}
    for step in steps:
        if step.kind == "train" and found[step.name].state == StepState.DONE and lacks_adapter(step):
            needs = [found[other.name].state != StepState.DONE for other in _evaluations_of(step, steps)]
            if any(needs) or not needs:
                found[step.name] = to_do(step)
    return found


def to_do(step: Step, cause: str = "") -> Outcome:
    """Return the outcome of a step that has not ended."""
    return Outcome(name=step.name, key=step.key, state=StepState.TO_DO, cause=cause)


def _evaluations_of(training: Step, steps: Sequence[Step]) -> list[Step]:
    return [step for step in steps if step.kind == "evaluate" and step.adapter == training.adapter]


def find_obstacle(step: Step, found: set[tuple[str | None, ...]] | None = None) -> str | None:
    """Return why a step cannot run here, from its files alone; None where no obstacle is found.

    Args:
        found: bases and splits that were usable before, and are not read again; this step's are added.
    """
    model, data, found = step.config.model, step.config.data, set() if found is None else found
    base = (model.base, model.revision, model.weights)
    split: Literal["train", "test"] = "train" if step.kind == "train" else "test"
    try:
        if base not in found:
            if step.base_id == model.base:  # else its weights are known, so it is usable
                find_source(model)
            found.add(base)
        for task in data.tasks:
            if (data.dir, task, split) not in found:
                read_prepared(Path(data.dir), task, split)
                found.add((data.dir, task, split))
    except FinloraError as error:
        return str(error)
    return None


def lacks_adapter(step: Step) -> bool:
    """Return whether the adapter that a step trains or scores is not there."""
    return step.adapter is not None and not (step.adapter / CONTRACT_FILE).is_file()


def foresee(steps: Sequence[Step], output: Path) -> list[Outcome]:
    """Return the expected outcome of each step without running any."""
    known = read_outcomes(output, steps)
    outcomes: list[Outcome] = []
    trainable: set[Path | None] = set()
    found: set[tuple[str | None, ...]] = set()
    for step in steps:
        outcome = known[step.name]
        if outcome.state != StepState.DONE:
            outcome = to_do(step)
            if obstacle := find_obstacle(step, found):
                outcome = dataclasses.replace(outcome, state=StepState.CANNOT_RUN, cause=obstacle)
            elif step.kind == "train":
                trainable.add(step.adapter)
            elif lacks_adapter(step) and step.adapter not in trainable:
                outcome = dataclasses.replace(outcome, state=StepState.WAITS)
        outcomes.append(outcome)
    return outcomes


def delete_weights(steps: Sequence[Step], outcomes: Mapping[str, Outcome]) -> None:
    """Delete adapters and checkpoints of the trainings all of whose evaluations are done; results and logs stay."""
    from finlora.train.run.snapshot import SNAPSHOT  # imports torch

    for step in steps:
        own = [step, *_evaluations_of(step, steps)]
        if step.kind != "train" or len(own) == 1 or any(outcomes[each.name].state != StepState.DONE for each in own):
            continue
        root = step.run.root
        for folder in (step.run.adapter, *root.glob("checkpoint_*")):
            shutil.rmtree(folder, ignore_errors=True)
        (root / SNAPSHOT).unlink(missing_ok=True)


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
