"""What ends a run for good, and which of the errors around it is the one to show."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from finlora.errors import FinloraError
from finlora.train.run.run_folder import RunFolder, explain_full_disk


class GiveUp(UserCallback):  # type: ignore[misc]
    """Ends the run at an error that FinLoRA raised on purpose: workers started again would only meet it again.

    Ray Train calls it in its controller, before it decides on a restart, and does not restart after an error in here.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for failure in worker_exceptions.values():
            cause = getattr(failure, "cause", None) or failure
            if isinstance(cause, FinloraError):
                raise cause


def own_error(error: Exception, folder: RunFolder) -> Exception:
    """Return the first FinloraError of workers and controller, or the error itself when none of ours caused it."""
    failures = list((getattr(error, "worker_failures", None) or {}).values())
    for failure in [*failures, getattr(error, "controller_failure", None), error.__cause__]:
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, FinloraError):
            return cause
        if cause is not None and (said := explain_full_disk(cause, folder)):
            return said
    return error
