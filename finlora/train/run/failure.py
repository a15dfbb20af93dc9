"""Errors that end a run without a restart, and the choice of the error to show."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from finlora.errors import FinloraError
from finlora.train.run.run_folder import RunFolder, explain_full_disk


class GiveUp(UserCallback):  # type: ignore[misc]
    """Callback that ends the run at a FinloraError: restarted workers would only raise it again.

    Ray Train calls it in its controller before it decides on a restart, and does not restart after an error raised here.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            cause = getattr(failure, "cause", None) or failure
            if isinstance(cause, FinloraError):
                raise cause


def own_error(error: Exception, folder: RunFolder) -> Exception:
    """Return the first FinloraError of workers and controller; the error itself where there is none."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for failure in [*failures, getattr(error, "controller_failure", None), error.__cause__]:
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, FinloraError):
            return cause
        if cause is not None and (said := explain_full_disk(cause, folder)):
            return said
    return error
