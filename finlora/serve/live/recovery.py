"""Recovery from stage crashes: restart only the crashed stages, or all of them if that fails, and retry until they run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from finlora.serve.stage_states import OpenCore

_logger = logging.getLogger(__name__)
_MAX_BACKOFF_S = 30.0
_MAX_UNPROVEN = 2
"""Repairs in a row without an answer in between. After them all stages restart, since the node or GPU may be the cause."""


class Recovery:
    """Restart of crashed stages, in the engine's thread.

    Args:
        open_core: starts all stages.
        closing: set when the server shuts down.
    """

    def __init__(self, open_core: Callable[[], OpenCore], closing: threading.Event) -> None:
        self._open_core, self._closing = open_core, closing
        self._num_unproven = 0
        self.why_down = "the model is being loaded"
        """Reason that clients read until the stages run."""

    def prove(self) -> None:
        """Note that the stages completed an answer."""
        self._num_unproven = 0

    def bring_back(self, lost: OpenCore) -> tuple[OpenCore, bool] | None:
        """Return running stages, and whether only the crashed ones restarted; None if the server closes first."""
        self.why_down = "a stage of the model crashed and is being restarted"
        repaired = self._repair(lost)
        if repaired is not None:
            return repaired, True
        close_quietly(lost)
        opened = self._restart_all()
        return None if opened is None else (opened, False)

    def _repair(self, lost: OpenCore) -> OpenCore | None:
        if lost.repair is None:
            return None
        if self._num_unproven >= _MAX_UNPROVEN:
            _logger.warning("Stages crashed %d times without an answer in between: restarting all", _MAX_UNPROVEN + 1)
            return None
        self._num_unproven += 1
        try:
            return lost.repair()
        except Exception as error:
            _logger.warning(
                "The crashed stages could not be restarted alone (%s: %s): restarting all",
                type(error).__name__,
                error,
            )
            return None

    def _restart_all(self) -> OpenCore | None:
        backoff = 1.0
        while not self._closing.is_set():
            try:
                opened = self._open_core()
            except Exception as error:
                self.why_down = f"the stages of the model could not be restarted ({error})"
                _logger.exception("The stages could not be restarted; next attempt in %.0f s", backoff)
                self._closing.wait(backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF_S)
            else:
                self._num_unproven = 0
                return opened
        return None


def close_quietly(opened: OpenCore) -> None:
    """Close stages, some of which may have crashed; an error is logged, not raised."""
    try:
        opened.close()
    except Exception as error:
        _logger.warning("The stages could not be closed cleanly: %s: %s", type(error).__name__, error)
