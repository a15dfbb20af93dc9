"""How the steps of a reproduction ended, kept so that what is done is not redone. No Ray here.

Layout of OUTPUT:
    steps/NAME.json    one Outcome, written whole when a step has ended
    runs/              run folders with their results.jsonl
    report/            report.html, report.md and plots of all results
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finlora.data.prepared import read_prepared
from finlora.durable import seal, unseal, write_whole
from finlora.errors import FinloraError, ResultError
from finlora.model.contract import CONTRACT_FILE
from finlora.model.source import find_source
from finlora.reproduce.plan import Step
from finlora.tables import TextTable

State = Literal["done", "cannot run", "failed", "to do"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a step ended."""

    name: str
    key: str
    """Step.key: an outcome of other settings does not count."""
    state: State
    cause: str = ""
    """Why it did not run or failed."""
    seconds: float = 0.0


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
            outcome = Outcome(**unseal(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise ResultError(
                f"{path} does not say any more how the step ended ({error}): delete that file to do the step again."
            ) from error
        is_there = step.kind == "evaluate" or (step.adapter is not None and (step.adapter / CONTRACT_FILE).is_file())
        if outcome.key == step.key and is_there:
            return outcome
    return Outcome(name=step.name, key=step.key, state="to do")


def find_obstacle(step: Step) -> str | None:
    """Return why a step cannot run here, as far as files tell, without taking a GPU; None where nothing stands in its way."""
    try:
        find_source(step.config.model)
        for task in step.config.data.tasks:
            read_prepared(Path(step.config.data.dir), task, "train" if step.kind == "train" else "test")
    except FinloraError as error:
        return str(error)
    if step.kind == "evaluate" and step.adapter is not None and not (step.adapter / CONTRACT_FILE).is_file():
        return f"its adapter {step.adapter} is not trained"
    return None


def outcome_table(outcomes: Sequence[Outcome]) -> TextTable:
    """One row a step: its state, its time, and the cause where it was not done."""
    counts = {
        state: sum(each.state == state for each in outcomes) for state in ("done", "cannot run", "failed", "to do")
    }
    return TextTable(
        title="Steps of the reproduction",
        header=("step", "state", "seconds", "why"),
        rows=tuple(
            (each.name, each.state, f"{each.seconds:,.0f}" if each.state == "done" else "", each.cause)
            for each in outcomes
        ),
        notes=(", ".join(f"{number} {state}" for state, number in counts.items() if number) + ".",),
    )
