"""Curves of a run as TensorBoard events, in the folder `tensorboard` of the run."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from finlora.train.tracking.tracker import Card, Point, RunState


class TensorboardTracker:
    """Writer of TensorBoard events. It takes the curves of the training and leaves settings, scores and files out."""

    run_id = "tensorboard"

    def __init__(self, card: Card) -> None:
        from tensorboardX import SummaryWriter

        # The name of its file has the second of its start alone; two starts within one would share it.
        own = f".{secrets.token_hex(4)}"
        self._writer = SummaryWriter(str(card.folder / "tensorboard"), filename_suffix=own)

    def log_points(self, points: Sequence[Point]) -> None:
        for point in points:
            for name, value in point.values.items():
                if name.startswith("train/"):
                    self._writer.add_scalar(name, value, point.step, walltime=point.at_ms / 1000)
        self._writer.flush()  # a search kills the driver of a trial that it stops

    def log_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_files(self, files: Sequence[Path]) -> None:
        pass

    def end(self, state: RunState, at_ms: int) -> None:
        self._writer.close()
