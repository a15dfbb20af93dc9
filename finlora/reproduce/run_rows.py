"""Runner of a reproduction's steps, one by one on the connected cluster. Each step can resume, and none stops the others."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from finlora.cluster import connect
from finlora.cluster.lease import seconds_waited
from finlora.errors import ConfigError, DatasetError, ModelError, ResourceError, StoppedError
from finlora.reproduce.outcomes import Outcome, StepState, find_obstacle, lacks_adapter, read_outcome, write_outcome
from finlora.reproduce.paper_rows import Step
from finlora.results import Result, append_result
from finlora.train.run.run_folder import RunFolder

_logger = logging.getLogger(__name__)

_CANNOT = (ConfigError, DatasetError, ModelError, ResourceError)
"""Errors that name a missing or unfitting input; any other error is a failure."""


def run_plan(steps: Sequence[Step], output: Path, announce: Callable[[str], None] = _logger.warning) -> list[Outcome]:
    """Run each step that is not done.

    Args:
        output: folder of the reproduction.
        announce: shows the user a line.

    Returns:
        The outcome of each step.

    Raises:
        StoppedError: a signal came; the current training stopped at a checkpoint or before its first step.
    """
    outcomes = []
    for number, step in enumerate(steps, start=1):
        outcome = read_outcome(output, step)
        if outcome.state != StepState.DONE:
            announce(f"[{number}/{len(steps)}] {step.name}")
            outcome = _run(step, announce)
            write_outcome(output, outcome)
            words = f": {outcome.cause}" if outcome.cause else ""
            words = f" in {outcome.seconds:.0f} s" if outcome.state == StepState.DONE else words
            announce(f"[{number}/{len(steps)}] {step.name}: {outcome.state}{words}")
        outcomes.append(outcome)
    return outcomes


def _run(step: Step, announce: Callable[[str], None]) -> Outcome:
    def end(state: StepState, cause: str = "", seconds: float = 0.0, waited: float = 0.0) -> Outcome:
        return Outcome(name=step.name, key=step.key, state=state, cause=cause, seconds=seconds, waited=waited)

    if obstacle := find_obstacle(step):
        return end(StepState.CANNOT_RUN, obstacle)
    if lacks_adapter(step):
        return end(StepState.WAITS)
    try:
        if step.kind == "train":
            from finlora.train.worker import run_training

            trained = run_training(step.config, announce)
            return end(StepState.DONE, "", trained.wall_seconds or 0.0, trained.waited_seconds or 0.0)
        started, before = time.monotonic(), seconds_waited()
        results = _evaluate(step, announce)
        # The evaluation waits here for its own room, and its stages wait there for theirs.
        waited = seconds_waited() - before + max((result.waited_seconds or 0.0 for result in results), default=0.0)
        return end(StepState.DONE, "", time.monotonic() - started - waited, waited)
    except StoppedError:
        raise
    except _CANNOT as error:
        return end(StepState.CANNOT_RUN, str(error))
    except Exception as error:  # a failed step must not stop the others; its cause is kept
        return end(StepState.FAILED, f"{type(error).__name__}: {error}")


def _evaluate(step: Step, announce: Callable[[str], None]) -> list[Result]:
    from finlora.evaluate.evaluation import run_evaluation

    config = step.config
    on_gpu = config.eval.device == "cuda" and config.eval.num_stages == 1  # stages have GPUs of their own
    results = connect.call(
        run_evaluation,
        *(config, step.adapter, _ignore_progress),
        num_cpus=1.0,
        num_gpus=config.eval.num_gpus if on_gpu else 0.0,
        wait_s=config.max_wait_s,
        announce=announce,
        title=f"the evaluation of {config.name}",
    )
    folder = RunFolder(Path(config.output_dir) / config.name)
    for result in results:
        append_result(folder.results, result)
    return results


def _ignore_progress(_task: str, _done: int, _total: int) -> None:
    """No progress is shown within a step."""
