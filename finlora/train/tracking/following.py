"""Tracking in a thread of the driver: logs what the workers write into the run's folder; no error of it ends a training."""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from finlora.config import RunConfig
from finlora.durable import try_lock
from finlora.errors import ConfigError, FinloraError, ResourceError, StoppedError
from finlora.train.run.run_folder import RunFolder
from finlora.train.tracking.run_view import read_view
from finlora.train.tracking.stores import Store, list_stores
from finlora.train.tracking.tracked import TrackedRun
from finlora.train.tracking.tracker import RunState

_EVERY_S = 10.0
"""Seconds between two looks at the folder."""
_SHARE = 0.05
"""Largest share of the time that is spent on logging: a slow store is given longer pauses, up to _MAX_PAUSE_S."""
_MAX_PAUSE_S = 60.0
_RETRY_S = 60.0
"""Pause after the first failure of a store; each further one doubles it."""
_MAX_RETRY_S = 1800.0
_CLOSE_S = 60.0
"""Longest wait for a store at the end of a run."""
_HURRY_S = 3.0
"""The same when a second signal ends the process at once."""
_LOCK_S = 10.0
"""Longest wait for another process that logs into the same run."""


class Tracked(Protocol):
    """What is logged to one store: a run, or a search with its trials."""

    store: Store

    def update(self) -> None: ...

    def end(self, state: RunState | None) -> None: ...

    def drop(self) -> None: ...


def track_training(
    config: RunConfig, folder: RunFolder, announce: Callable[[str], None]
) -> contextlib.AbstractContextManager[None]:
    """Log a training to the stores of its config while inside. It ends as finished, stopped or failed."""
    stores = list_stores(config, is_training=True)
    return following(folder, [TrackedRun(folder, store, lambda: read_view(folder)) for store in stores], announce)


def track_results(config: RunConfig, folder: RunFolder, announce: Callable[[str], None]) -> None:
    """Log the scores of an evaluation to the run's stores."""
    stores = list_stores(config, is_training=False)
    runs = [TrackedRun(folder, store, lambda: read_view(folder)) for store in stores]
    with following(folder, runs, announce, is_live=False):
        pass


@contextlib.contextmanager
def following(
    folder: RunFolder, tracked: Sequence[Tracked], announce: Callable[[str], None], *, is_live: bool = True
) -> Iterator[None]:
    """Log from a thread while inside, and the rest at the end.

    Args:
        folder: of the run or search.
        tracked: one for each store.
        announce: shows the user a line. Each store that fails gets one.
        is_live: the body is the run. False: it has ended before, and the folder says how.
    """
    if not tracked:
        yield
        return
    follower = _Follower(folder, tracked, announce)
    follower.start()
    state, seconds = RunState.FAILED if is_live else None, _HURRY_S
    try:
        yield
        state, seconds = RunState.FINISHED if is_live else None, _CLOSE_S
    except Exception as error:
        state = RunState.STOPPED if isinstance(error, StoppedError) else state
        seconds = _CLOSE_S
        raise
    finally:
        follower.close(state, seconds)


def export(folder: RunFolder, tracked: Tracked) -> None:
    """Log a run or a search that has ended, or what its stores lack of it.

    Raises:
        FinloraError: it could not be logged.
    """
    with _hold(folder, _LOCK_S):
        try:
            tracked.end(None)
        except FinloraError:
            raise
        except Exception as error:
            raise ResourceError(f"{tracked.store.title} does not take the run: {_reason(error)}") from error


class _Follower(threading.Thread):
    def __init__(self, folder: RunFolder, tracked: Sequence[Tracked], announce: Callable[[str], None]) -> None:
        super().__init__(name="tracking", daemon=True)
        self._folder, self._tracked, self._announce = folder, list(tracked), announce
        self._ended = threading.Event()
        self._state: RunState | None = None
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    def run(self) -> None:
        try:
            with _hold(self._folder, _LOCK_S):
                pause = 0.0
                while not self._ended.wait(pause):
                    started = time.monotonic()
                    for each in self._tracked[:]:
                        if time.monotonic() >= self._not_before.get(each.store.title, 0.0):
                            self._try(each, each.update)
                    pause = max(_EVERY_S, min(_MAX_PAUSE_S, (time.monotonic() - started) / _SHARE))
                for each in self._tracked[:]:
                    self._try(each, functools.partial(each.end, self._state))
        except FinloraError as error:  # another process holds the lock
            self._announce(f"{error}")

    def close(self, state: RunState | None, seconds: float) -> None:
        """Log the rest and end the runs, for at most so many seconds."""
        self._state = state
        self._ended.set()
        self.join(seconds)
        if self.is_alive() and seconds == _CLOSE_S:
            names = ", ".join(each.store.title for each in self._tracked)
            self._announce(f"Warning: {names} did not answer within {seconds:.0f} s. {self._advise(self._tracked[0])}")

    def _try(self, each: Tracked, act: Callable[[], None]) -> None:
        title = each.store.title
        try:
            act()
        except Exception as error:
            each.drop()
            count = self._failures[title] = self._failures.get(title, 0) + 1
            self._not_before[title] = time.monotonic() + min(_MAX_RETRY_S, _RETRY_S * 2 ** (count - 1))
            if isinstance(error, ConfigError):
                self._tracked.remove(each)
            if count == 1:
                self._announce(f"Warning: {title} does not take the run: {_reason(error)}. {self._advise(each)}")

    def _advise(self, each: Tracked) -> str:
        kind = each.store.kind
        if kind == "tensorboard":
            return "The run goes on without it."
        return f"The run goes on without it; `finlora export {kind} {self._folder.root}` logs later what is missing."


@contextlib.contextmanager
def _hold(folder: RunFolder, seconds: float) -> Iterator[None]:
    """Hold the lock on the folder's `tracking/`, after waiting for another process for at most so many seconds.

    Raises:
        ResourceError: another process still holds it, or it cannot be written.
    """
    path = folder.tracking / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written ({error}): the run is not tracked.") from error
    with stream:
        deadline = time.monotonic() + seconds
        while not try_lock(stream):
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"{folder.root} is tracked by another process, which logs what is new in the folder as well."
                )
            time.sleep(0.2)
        yield


def _reason(error: Exception) -> str:
    """Return an error's first words on one line."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}{': ' if text else ''}{text[:300]}" if not isinstance(error, FinloraError) else text
