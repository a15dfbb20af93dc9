"""Curves as TensorBoard reads them."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest
from made_run import add_evaluation, add_step, add_training, make_run

from finlora.train.tracking.run_view import read_view
from finlora.train.tracking.stores import Store
from finlora.train.tracking.tracked import TrackedRun


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of TensorBoard's own imports
def test_curve_is_written_once_over_two_starts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = make_run(tmp_path)
    for step in (6, 8):
        tracked = TrackedRun(folder, Store("tensorboard", "", "finlora"), lambda: read_view(folder))
        tracked.update()
        add_step(folder, step)
        tracked.end(None)
    add_training(folder)
    add_evaluation(folder)
    tracked.end(None)
    events = EventAccumulator(str(folder.root / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == [
        *("train/epoch", "train/examples_per_second", "train/learning_rate", "train/loss", "train/memory_gib"),
        "train/tokens_per_second",
    ]
    points = events.Scalars("train/loss")
    assert {point.step: point.value for point in points} == pytest.approx({2: 1 / 2, 4: 1 / 4, 6: 1 / 6, 8: 1 / 8})
    assert len(points) == 4


def test_full_disk_raises_where_it_is_logged_and_nothing_at_the_end_of_the_process(tmp_path):
    script = f"""
import resource, signal
from pathlib import Path
from finlora.train.tracking.tensorboard_tracker import TensorboardTracker
from finlora.train.tracking.tracker import Point
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tracker = TensorboardTracker(SimpleNamespace(folder=Path({str(tmp_path)!r})))
resource.setrlimit(resource.RLIMIT_FSIZE, (100, -1))
try:
    tracker.log_points([Point(step=step, at_ms=0, values={{"train/loss": 1.0}}) for step in range(9)])
except OSError as error:
    print("raised", error.errno)
"""
    ended = subprocess.run(
        [sys.executable, "-c", f"from types import SimpleNamespace{script}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"raised {errno.EFBIG}\n", "")
