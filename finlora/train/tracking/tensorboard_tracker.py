"""Curves of a run as TensorBoard events, in the folder `tensorboard` of the run."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from finlora.train.tracking.tracker import Card, Point, RunState


class TensorboardTracker:
    """Writer of TensorBoard events. It takes the curves of the training and leaves settings, scores and files out.

    It has tensorboardX's writer of files alone. SummaryWriter puts a thread and a queue before it, where a full disk raises
    outside this module, and flushes once more at the end of the process, with a traceback.
    """

    run_id = "tensorboard"

    def __init__(self, card: Card) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder = card.folder / "tensorboard"
        folder.mkdir(exist_ok=True)
        # The name of its file has the second of its start alone; two starts within one would share it.
        self._writer = EventsWriter(str(folder / "events"), f".{secrets.token_hex(4)}")

    def log_points(self, points: Sequence[Point]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        for point in points:
            for name, value in point.values.items():
                if name.startswith("train/"):
                    event = Event(wall_time=point.at_ms / 1000, step=point.step, summary=scalar(name, value))
                    self._writer.write_event(event)
        self._writer.flush()  # a search kills the driver of a trial that it stops

    def log_tags(self, tags: Mapping[str, str]) -> None:
        pass

    def log_files(self, files: Sequence[Path]) -> None:
        pass

    def end(self, state: RunState, at_ms: int) -> None:
        self._writer.close()
