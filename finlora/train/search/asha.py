"""Hooks of a search in Ray Tune: the ASHA scheduler, the stop of all trials, and the listener for their ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from finlora.train.held_out import HELD_OUT, read_held_out
from finlora.train.search.run_trial import TrialTask, write_end
from finlora.train.search.search_folder import Mark, SearchFolder, TrialRecord, TrialState, read_record
from finlora.train.search.space import OWN

_CLOSE_S = 60.0
"""Longest wait for trials to stop at a checkpoint."""


class ResumedAsha(ASHAScheduler):  # type: ignore[misc]
    """ASHA scheduler that starts from the reports of earlier trials and marks the trials that it stops.

    Args:
        grace: steps before the first rung.
        done: trials of the search that have ended.
    """

    def __init__(
        self, folder: SearchFolder, reduction_factor: int, total_steps: int, grace: int, done: Sequence[TrialRecord]
    ) -> None:
        # The last rung is before the last step: a trial stopped at its last step would be trained for nothing.
        last = max(1, total_steps - 1)
        super().__init__(
            time_attr="step",
            metric=HELD_OUT,
            mode="min",
            max_t=last,
            grace_period=min(grace, last),
            reduction_factor=reduction_factor,
            stop_last_trials=False,
        )
        self._folder = folder
        for record in done:
            past = _Past(record.trial.name)
            self.on_trial_add(None, past)
            for report in read_held_out(folder.run_of(record.trial)):
                super().on_trial_result(None, past, report)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Decide as ASHA does, but never stop the first trial, the unchanged config: it is the baseline of the others."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        name = trial.config["trial"]
        if decision != self.STOP or name.startswith(OWN):
            return str(self.CONTINUE)
        (self._folder.trials / name / Mark.PRUNED).write_text(str(result["step"]), encoding="utf-8")
        return decision


@dataclass(frozen=True, slots=True)
class _Past:
    """Ended trial, reduced to the attribute that ASHA reads."""

    trial_id: str


class StopWhenIdle(tune.Stopper):  # type: ignore[misc]
    """Stopper that ends Ray Tune after a signal once no trial works: earlier it would kill them between checkpoints."""

    def __init__(self, folder: SearchFolder) -> None:
        self._folder = folder
        self._since: float | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Return whether a signal came and all trials have stopped, or the wait for them is over."""
        if not self._folder.stop.read_text(encoding="utf-8").strip():
            return False
        self._since = self._since or time.monotonic()
        is_idle = not any(self._folder.trials.glob(f"*/{Mark.BUSY}"))
        return is_idle or time.monotonic() - self._since > _CLOSE_S


class Listener(tune.Callback):  # type: ignore[misc]
    """Callback in the search's own process that records how trials end, also those whose driver was killed."""

    def __init__(
        self, folder: SearchFolder, tasks: dict[str, TrialTask], on_record: Callable[[TrialRecord], None]
    ) -> None:
        self._folder, self._tasks, self._on_record = folder, tasks, on_record

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        task = self._tasks[trial.config["trial"]]
        run = self._folder.run_of(task.trial)
        mark = run.root / Mark.PRUNED
        if mark.is_file() and read_record(self._folder, task.trial) is None:
            cause = f"stopped by ASHA at step {mark.read_text(encoding='utf-8')}"
            write_end(self._folder, task, TrialState.PRUNED, cause=cause)
            (run.root / Mark.BUSY).unlink(missing_ok=True)
        self._tell(task)

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        task = self._tasks[trial.config["trial"]]
        run = self._folder.run_of(task.trial)
        if read_record(self._folder, task.trial) is None and not (run.root / Mark.UNPLACED).is_file():
            lines = (trial.get_error() or "its driver crashed").__str__().strip().splitlines()
            write_end(self._folder, task, TrialState.FAILED, cause=lines[-1])
        (run.root / Mark.BUSY).unlink(missing_ok=True)
        self._tell(task)

    def _tell(self, task: TrialTask) -> None:
        record = read_record(self._folder, task.trial)
        if record is not None:
            self._on_record(record)
