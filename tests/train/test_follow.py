"""What a user sees of a running training: how it trains, once, then its last record."""

from __future__ import annotations

from finlora.train.follow import Follower
from finlora.train.loop import Progress
from finlora.train.progress import append_progress
from finlora.train.run import RunFolder


def record(step):
    return Progress(
        step=step,
        total_steps=10,
        epoch=1.0,
        loss=0.5,
        learning_rate=1e-4,
        tokens_per_second=1234.0,
        examples_per_second=2.0,
        memory_gib=1.5,
        seconds_left=61.0,
    )


def test_plan_comes_once_and_records_as_they_are_written(tmp_path):
    folder, shown, said = RunFolder(tmp_path), [], []
    follow = Follower(
        folder, "run", lambda *shows: shown.append(shows), said.append, lambda seconds: f"{seconds:.0f} s"
    )
    follow()
    assert (shown, said) == ([], [])
    folder.plan.write_text("Training packed: a pack\n")
    for step in (1, 2):
        append_progress(folder, record(step))
        follow()
    assert said == ["Training packed: a pack"]
    assert [row[:3] for row in shown] == [("run", 1, 10), ("run", 2, 10)]
    assert shown[1][3] == "loss 0.5000  1,234 tokens/s  1.5 GiB  61 s left"
