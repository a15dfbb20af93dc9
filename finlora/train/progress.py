"""The numbers of a run in its folder, a sealed line an optimiser step that was logged. No Ray here."""

from __future__ import annotations

import dataclasses
from typing import Any

from finlora.durable import append_line, read_last_line, read_lines
from finlora.train.loop import Progress
from finlora.train.run import RunFolder


def append_progress(folder: RunFolder, progress: Progress) -> None:
    """Append one line.

    Raises:
        OSError: it did not go in whole, as on a full disk.
    """
    append_line(folder.progress, dataclasses.asdict(progress))


def read_progress(folder: RunFolder) -> list[Progress]:
    """Return the records in step order; of a step run twice (after a crash) the later one counts.

    A line cut short, by a crash or because it is being written, is left out, as is one whose bits have changed: the resumed run
    writes that step again, or the curve lacks it.
    """
    by_step = {record.step: record for line in read_lines(folder.progress) if (record := _parse(line)) is not None}
    return [by_step[step] for step in sorted(by_step)]


def last_progress(folder: RunFolder) -> Progress | None:
    """Return the record written last, without reading those of the hours before; None where there is none."""
    line = read_last_line(folder.progress)
    return None if line is None else _parse(line)


def _parse(line: dict[str, Any]) -> Progress | None:
    try:
        return Progress(**line)
    except TypeError:
        return None
