"""Curves as TensorBoard reads them."""

from __future__ import annotations

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
