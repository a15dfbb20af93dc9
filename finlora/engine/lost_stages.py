"""What Ray says of stages that died or failed, in our words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.exceptions import RayError

from finlora.errors import StageLostError


@contextmanager
def tell_lost_stages() -> Iterator[None]:
    """Turn Ray's errors into one that says what to do.

    Raises:
        StageLostError: a stage is dead, has failed, or has given no answer for too long.
    """
    try:
        yield
    except RayError as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise StageLostError(
            f"a stage of the model was lost ({reason[0]}): ask again; if it happens again, the worker's log in the Ray dashboard "
            "says whether memory was short."
        ) from error
