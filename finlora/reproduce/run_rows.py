"""Execution of one step of a reproduction on the connected cluster. It raises nothing: every end is an Outcome."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

from finlora.cluster import connect
from finlora.cluster.lease import seconds_waited
from finlora.errors import ConfigError, DatasetError, ModelError, ResourceError, StoppedError
from finlora.reproduce.outcomes import Outcome, StepState, find_obstacle, lacks_adapter, to_do
from finlora.reproduce.step import Step
from finlora.results import Result, append_result
from finlora.train.run.run_folder import examine_run
from finlora.train.run.summary import find_finished
from finlora.train.tracking.following import track_results

_CANNOT = (ConfigError, DatasetError, ModelError, ResourceError)
"""Errors that name a missing or unfitting input; any other error is a failure."""


def run_step(step: Step, announce: Callable[[str], None]) -> Outcome:
    """Run a step to its end. A training that has ended before is not repeated.

    Args:
        announce: shows the user a line.

    Returns:
        Its outcome; `to do` where the training was told to stop, by its run's `stop` file.
    """

    def end(state: StepState, cause: str = "", seconds: float = 0.0, waited: float = 0.0) -> Outcome:
        return Outcome(name=step.name, key=step.key, state=state, cause=cause, seconds=seconds, waited=waited)

    try:
        if obstacle := find_obstacle(step):
            return end(StepState.CANNOT_RUN, obstacle)
        if step.kind == "train":
            from finlora.train.worker import run_training

            trained = find_finished(examine_run(step.config)) or run_training(step.config, announce)
            return end(StepState.DONE, "", trained.wall_seconds or 0.0, trained.waited_seconds or 0.0)
        if lacks_adapter(step):
            return end(StepState.WAITS)
        started, before = time.monotonic(), seconds_waited()
        results = _evaluate(step, announce)
        # The evaluation waits here for its own room, and its stages wait there for theirs.
        waited = seconds_waited() - before + max((result.waited_seconds or 0.0 for result in results), default=0.0)
        return end(StepState.DONE, "", time.monotonic() - started - waited, waited)
    except StoppedError as stop:
        return to_do(step, str(stop))
    except _CANNOT as error:
        return end(StepState.CANNOT_RUN, str(error))
    except Exception as error:  # a failed step must not stop the others; its cause is kept
        announce(traceback.format_exc())
        return end(StepState.FAILED, f"{type(error).__name__}: {error}")


def _evaluate(step: Step, announce: Callable[[str], None]) -> list[Result]:
    from finlora.card.hub_readme import refresh_scores
    from finlora.evaluate.evaluation import ignore_reading, run_evaluation
    from finlora.evaluate.reference import refresh_reference

    config = step.config
    on_gpu = config.eval.device == "cuda" and config.eval.num_stages == 1  # stages have GPUs of their own
    results = connect.call(
        run_evaluation,
        *(config, step.adapter, _ignore_progress, ignore_reading, None, step.run.answers),
        num_cpus=1.0,
        num_gpus=config.eval.num_gpus if on_gpu else 0.0,
        wait_s=config.max_wait_s,
        announce=announce,
        title=f"the evaluation of {config.name}",
    )
    for result in results:
        append_result(step.run.results, result)
    if step.adapter is not None:
        for refresh in (refresh_scores, refresh_reference):
            if said := refresh(step.adapter, step.run.results):
                announce(said)
    track_results(config, step.run, announce)
    return results


def _ignore_progress(_task: str, _done: int, _total: int) -> None:
    """No progress is shown within a step."""
