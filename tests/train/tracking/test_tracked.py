"""A run's folder and its run in a store: one id over restarts, each number once."""

from __future__ import annotations

import pytest
from made_run import Memory, add_evaluation, add_step, add_training, make_run

from finlora.errors import ResultError
from finlora.train.tracking.run_view import read_view
from finlora.train.tracking.tracked import TrackedRun, read_logged


@pytest.fixture
def store(tmp_path):
    return Memory("mlflow", f"memory {tmp_path}", "finlora")


def track(folder, store):
    return TrackedRun(folder, store, lambda: read_view(folder))


def steps_of(store):
    (run,) = store.content.runs.values()
    return [point.step for point in run["points"]]


def test_next_process_goes_on_in_the_same_run_and_repeats_nothing(tmp_path, store):
    folder = make_run(tmp_path)
    first = track(folder, store)
    first.update()
    first.update()
    assert steps_of(store) == [2, 4]
    add_step(folder, 4)  # done again from the last checkpoint, after a crash
    add_step(folder, 6)
    add_training(folder)
    add_evaluation(folder)
    second = track(folder, store)
    second.end(None)
    second = track(folder, store)
    second.end(None)
    assert first.run_id == second.run_id == "run-0"
    assert steps_of(store) == [2, 4, 6, 6, 6]  # the points, then the training's result and the evaluation's
    run = store.content.runs["run-0"]
    assert run["files"] == ["config.yaml", "plan.txt", "results.jsonl", "adapter"]
    assert [state for state, _ in run["states"]] == ["finished", "finished"]
    assert read_logged(folder, store).scores == ["result 0", "result 1"]


def test_stores_know_nothing_of_each_other(tmp_path, store):
    folder = make_run(tmp_path)
    other = Memory("mlflow", f"other {tmp_path}", "finlora")
    track(folder, store).update()
    track(folder, other).update()
    assert steps_of(store) == steps_of(other) == [2, 4]


def test_what_was_logged_before_an_error_is_not_logged_again(tmp_path, store):
    folder = make_run(tmp_path)
    add_training(folder)
    tracked, calls = track(folder, store), []

    def fail_at_third():
        calls.append(1)
        if len(calls) == 3:  # open, the curve, the scores
            raise OSError("gone")

    store.content.act = fail_at_third
    with pytest.raises(OSError, match="gone"):
        tracked.update()
    tracked.drop()
    tracked.update()
    assert steps_of(store) == [2, 4, 4]
    assert store.content.opened == ["run-0", "run-0"]


def test_damaged_file_is_named_with_what_to_do(tmp_path, store):
    folder = make_run(tmp_path)
    track(folder, store).update()
    (path,) = folder.tracking.iterdir()
    path.write_text(path.read_text().replace("run-0", "run-1"))
    with pytest.raises(
        ResultError, match=r"is damaged \(it was changed after it was written.*: delete it, and the run"
    ):
        track(folder, store).update()
