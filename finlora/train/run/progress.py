"""Progress records of a run: one sealed line for each logged optimiser step, and a note of the steps done. No Ray here."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

from finlora.configfile import load_config
from finlora.durable import append_line, read_last_line, read_lines, write_whole
from finlora.train.run.run_folder import RunFolder
from finlora.train.steps.loop import Progress

_MARK_SECONDS = 5.0


def append_progress(folder: RunFolder, progress: Progress) -> None:
    """Append one line.

    Raises:
        OSError: the line was not written completely, as on a full disk.
    """
    append_line(folder.progress, dataclasses.asdict(progress))


def read_progress(folder: RunFolder) -> list[Progress]:
    """Return the records in step order; of a step that ran twice, after a crash, the later one counts.

    Truncated and altered lines are left out: a resumed run writes the step again, or the curve lacks it.
    """
    by_step = {record.step: record for line in read_lines(folder.progress) if (record := _parse(line)) is not None}
    return [by_step[step] for step in sorted(by_step)]


def last_progress(folder: RunFolder) -> Progress | None:
    """Return the record written last without reading the whole file; None where there is none."""
    line = read_last_line(folder.progress)
    return None if line is None else _parse(line)


class StepMark:
    """File with the steps done, rewritten every few seconds: records come every train.log_every_steps, minutes apart.

    Args:
        clock: monotonic clock in seconds.
    """

    def __init__(self, folder: RunFolder, total_steps: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self._total_steps, self._clock = folder, total_steps, clock
        self._written = -math.inf

    def tick(self, step: int) -> None:
        """Note the steps done. Writes at the first step, at the last, and when the last note is _MARK_SECONDS old."""
        now = self._clock()
        if now - self._written < _MARK_SECONDS and step < self._total_steps:
            return
        self._written = now
        with contextlib.suppress(OSError):  # a full disk is reported at the next record or checkpoint
            write_whole(self.folder.step, f"{step} {self._total_steps}")


def clear_step(folder: RunFolder) -> None:
    """Note that no step was done since the workers were started. The file stays: on NFS a new one may be overlooked."""
    folder.step.write_text("", encoding="utf-8")


def read_step(folder: RunFolder) -> tuple[int, int] | None:
    """Return the steps done and those of the whole run, as StepMark noted them; None before the first step of this start."""
    try:
        done, total = folder.step.read_text(encoding="utf-8").split()
        return int(done), int(total)
    except (OSError, ValueError):
        return None


def count_step_seconds(folder: RunFolder) -> float:
    """Return the time of all logged steps over all attempts, without start-up, checkpoints and waiting."""
    records = read_progress(folder)
    if not records:
        return 0.0
    batch = load_config(folder.config).train.global_batch_size
    seconds, before = 0.0, 0
    for record in records:
        seconds += (record.step - before) * batch / record.examples_per_second
        before = record.step
    return seconds


def _parse(line: dict[str, Any]) -> Progress | None:
    try:
        return Progress(**line)
    except TypeError:
        return None
