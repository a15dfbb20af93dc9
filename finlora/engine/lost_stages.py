"""What Ray says of stages that died or failed, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayActorError, RayError, RayTaskError

from finlora.errors import FinloraError, ResourceError, StageLostError


@contextmanager
def tell_lost_stages() -> Iterator[None]:
    """Turn Ray's errors into one that says what to do.

    Raises:
        ResourceError: a stage could not be loaded.
        StageLostError: one is dead, has failed, or has given no answer for too long.
    """
    try:
        yield
    except RayError as error:
        if isinstance(error, FinloraError):  # one of ours that a stage raised: Ray gives it both classes
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        # Of what a stage raised, the lines before are its traceback; of a dead one, those behind are Ray's guesses.
        if isinstance(error, RayActorError) and error.actor_init_failed:
            reason = said[-1].removeprefix(f"{ResourceError.__module__}.")
            raise ResourceError(f"a stage of the model cannot be loaded: {reason}") from error
        reason = said[-1] if isinstance(error, RayTaskError) else said[0]
        raise StageLostError(
            f"a stage of the model was lost ({reason}): ask again; if it happens again, the worker's log in the Ray dashboard "
            "says whether memory was short."
        ) from error
