"""How lost stages come back: the dead ones alone where that helps, else all of them anew, until they stand."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from finlora.serve.stage_states import OpenCore

_logger = logging.getLogger(__name__)
_MAX_BACKOFF_S = 30.0
_MAX_UNPROVEN = 2
"""Repairs in a row without an answer between them: a stage that dies again and again may do so for where it runs."""


class Recovery:
    """Brings stages back, in the engine's thread.

    Args:
        open_core: brings all stages up.
        closing: set when nobody wants them back any more.
    """

    def __init__(self, open_core: Callable[[], OpenCore], closing: threading.Event) -> None:
        self._open_core, self._closing = open_core, closing
        self._num_unproven = 0
        self.why_down = "the model is being loaded"
        """Told to clients meanwhile."""

    def prove(self) -> None:
        """Say that an answer came: the stages do their work."""
        self._num_unproven = 0

    def bring_back(self, lost: OpenCore) -> tuple[OpenCore, bool] | None:
        """Return stages that stand, and whether only dead ones had to be started; None where closing came first."""
        self.why_down = "a stage of the model died and is being restarted"
        repaired = self._repair(lost)
        if repaired is not None:
            return repaired, True
        close_quietly(lost)
        opened = self._open_anew()
        return None if opened is None else (opened, False)

    def _repair(self, lost: OpenCore) -> OpenCore | None:
        if lost.repair is None:
            return None
        if self._num_unproven >= _MAX_UNPROVEN:
            _logger.warning(
                "Stages died %d times without an answer in between: all are started anew", _MAX_UNPROVEN + 1
            )
            return None
        self._num_unproven += 1
        try:
            return lost.repair()
        except Exception as error:
            _logger.warning(
                "No stage could be restarted alone (%s: %s): all are started anew", type(error).__name__, error
            )
            return None

    def _open_anew(self) -> OpenCore | None:
        backoff = 1.0
        while not self._closing.is_set():
            try:
                opened = self._open_core()
            except Exception as error:
                self.why_down = f"the stages of the model could not be restarted ({error})"
                _logger.exception("The stages could not be restarted; the next try is in %.0f s", backoff)
                self._closing.wait(backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF_S)
            else:
                self._num_unproven = 0
                return opened
        return None


def close_quietly(opened: OpenCore) -> None:
    """Close stages of which some may be dead."""
    try:
        opened.close()
    except Exception as error:
        _logger.warning("Stages could not be closed in order: %s: %s", type(error).__name__, error)
