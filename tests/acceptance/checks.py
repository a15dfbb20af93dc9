"""Checks of the acceptance walk: expected value, found value and verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "failed", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One check of one step: a line of the table."""

    step: str
    command: str
    what: str
    expected: str
    found: str
    seconds: float
    """Seconds of the checked command."""
    state: State


class StepError(Exception):
    """A step cannot continue: its command failed, or its output lacks a value for the next check. Its row is already added."""


class Checks:
    """Rows of one step, in the order of its checks; each names the last command.

    Args:
        on_row: called with each row at once.
    """

    def __init__(self, step: str, on_row) -> None:
        self.step, self.rows = step, []
        self._on_row = on_row
        self._command, self._seconds = "", 0.0

    def about(self, command: str, seconds: float) -> None:
        """Set the command of the next checks."""
        self._command, self._seconds = command, seconds

    def equal(self, what: str, expected: object, found: object) -> bool:
        return self._add(what, str(expected), str(found), expected == found)

    def at_least(self, what: str, floor: float, found: float) -> bool:
        return self._add(what, f"at least {number(floor)}", number(found), found >= floor)

    def at_most(self, what: str, most: float, found: float) -> bool:
        return self._add(what, f"at most {number(most)}", number(found), found <= most)

    def close(self, what: str, expected: float, found: float, tolerance: float) -> bool:
        """Compare two numbers; `tolerance` is absolute."""
        is_close = math.isfinite(found) and abs(expected - found) <= tolerance
        return self._add(what, f"{number(expected)} ± {number(tolerance)}", number(found), is_close)

    def contains(self, what: str, words: str, text: str) -> bool:
        """Search words in a text; the table shows their line, or else the last line."""
        flat = " ".join(text.split())
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["nothing"]
        held = next((line for line in lines if words in line), lines[-1])
        return self._add(what, f"... {words} ...", held[:160], words in flat)

    def fail(self, what: str, expected: str, found: str) -> None:
        self._add(what, expected, found, False)

    def skip(self, what: str, why: str) -> None:
        """Record a check that cannot run here."""
        self._row(what, "", why, "skipped")

    def _add(self, what: str, expected: str, found: str, is_good: bool) -> bool:
        self._row(what, expected, found, "ok" if is_good else "failed")
        return is_good

    def _row(self, what: str, expected: str, found: str, state: State) -> None:
        row = Row(
            step=self.step,
            command=self._command,
            what=what,
            expected=expected,
            found=found,
            seconds=self._seconds,
            state=state,
        )
        self.rows.append(row)
        self._on_row(row)


def number(value: float) -> str:
    """Write a number with four significant digits, counts in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
