"""Note of a run's start: worker 0 writes its phase and seconds, the driver shows them and joins its own. No Ray here."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from finlora.durable import seal, unseal, write_whole
from finlora.machine.start_clock import StartClock, describe_start, read_boot_clock
from finlora.train.run.run_folder import RunFolder

FIRST_STEP = "first step"
WORKERS = "workers"
"""Phase of a driver in which it waits for its workers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StartNote:
    """Start of a worker so far."""

    phase: str | None
    """None: the first step is done."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Of each phase that has ended."""
    ended: float | None = None
    """When the first step was done, by `read_boot_clock` of the machine `boot`."""
    boot: str = ""


def write_note(folder: RunFolder, clock: StartClock, phase: str | None) -> None:
    """Write the note of a worker that is in a phase; None: behind its first step. A full disk is reported elsewhere."""
    ended = read_boot_clock() if phase is None else None
    note = StartNote(phase=phase, seconds=clock.seconds, ended=ended, boot=_find_boot())
    with contextlib.suppress(OSError):
        write_whole(folder.start, json.dumps(seal(asdict(note))))


def read_note(folder: RunFolder) -> StartNote | None:
    """Return the note of the workers' last start; None where there is none yet."""
    try:
        return StartNote(**unseal(json.loads(folder.start.read_text(encoding="utf-8"))))
    except (OSError, ValueError, TypeError):
        return None


def clear_note(folder: RunFolder) -> None:
    """Forget an earlier start. The file stays: on NFS a new one may be overlooked."""
    folder.start.write_text("", encoding="utf-8")


class StartWatch:
    """Driver's clock of a run's start, joined with its worker's; the wait for the workers begins with it.

    Args:
        clock: of the command. None: of the workers' start alone, of which nothing is said.
        announce: shows a line, once the first step is done.
    """

    def __init__(self, folder: RunFolder, clock: StartClock | None, announce: Callable[[str], None]) -> None:
        self._folder, self._announce = folder, None if clock is None else announce
        self._clock = clock or StartClock(WORKERS)
        self._clock.enter(WORKERS)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase; empty before the first step."""
        return self._clock.seconds if self._clock.is_ended else {}

    def look(self, waited: float) -> None:
        """Read the worker's note; call it about once a second.

        Args:
            waited: seconds that this start has waited for room.
        """
        if self._clock.is_ended or (note := read_note(self._folder)) is None or note.phase is not None:
            return
        self._clock.end(note.ended if note.boot == _find_boot() else None)
        self._clock.add(note.seconds, WORKERS, waited)
        if self._announce is not None:
            self._announce(describe_start(self._clock.seconds))


def _find_boot() -> str:
    """Return an id of this machine's last boot: only there is `read_boot_clock` the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
