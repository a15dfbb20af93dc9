"""Runs in a real MLflow store, an SQLite file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from made_run import STARTED_MS, add_evaluation, add_step, add_training, make_run

from finlora.errors import ResourceError
from finlora.train.tracking.run_view import read_view
from finlora.train.tracking.stores import Store
from finlora.train.tracking.tracked import TrackedRun
from finlora.train.tracking.tracker import Parent

pytest.importorskip("mlflow", reason="needs the extra mlflow")


@pytest.fixture
def store(offline_export, tmp_path):
    _, _, database = offline_export
    return Store("mlflow", f"sqlite:///{shutil.copy(database, tmp_path / 'm.db')}", "tests")


def client_of(store):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store.address)


def history(client, run_id):
    """Return each point of the loss."""
    return [(point.step, point.value, point.timestamp) for point in client.get_metric_history(run_id, "train/loss")]


def everything(client, run_id):
    """Return all that MLflow shows of a run but its id and places."""
    run = client.get_run(run_id)
    tags = {name: value for name, value in run.data.tags.items() if name != "finlora.folder"}
    points = {name: client.get_metric_history(run_id, name) for name in run.data.metrics}
    files = sorted(file.path for file in client.list_artifacts(run_id)) + [
        file.path for file in client.list_artifacts(run_id, "adapter")
    ]
    return (
        *(run.info.run_name, run.info.status, run.info.start_time, run.info.end_time, run.data.params, tags, files),
        {name: [(p.step, p.value, p.timestamp) for p in each] for name, each in points.items()},
    )


def test_resumed_run_is_one_run_with_settings_curve_scores_and_files(tmp_path, store):
    folder = make_run(tmp_path)
    first = TrackedRun(folder, store, lambda: read_view(folder))
    first.update()
    client = client_of(store)
    assert client.get_run(first.run_id).info.status == "RUNNING"
    first.end(None)
    assert client.get_run(first.run_id).info.status == "KILLED"
    add_step(folder, 6)
    add_training(folder)
    second = TrackedRun(folder, store, lambda: read_view(folder))
    second.end(None)
    add_evaluation(folder)
    third = TrackedRun(folder, store, lambda: read_view(folder))
    third.end(None)
    assert first.run_id == second.run_id == third.run_id
    seconds = {2: 4, 4: 8, 6: 12}
    assert history(client, first.run_id) == [(step, 1 / step, STARTED_MS + 1000 * s) for step, s in seconds.items()]
    run = client.get_run(first.run_id)
    assert (run.info.run_name, run.info.status) == ("made", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (STARTED_MS, STARTED_MS + 120_000)
    assert (run.data.params["lora.rank"], run.data.params["train.global_batch_size"]) == ("4", "8")
    scores = [run.data.metrics[f"test/fpb/accuracy{end}"] for end in ("_low", "", "_high")]
    assert scores == pytest.approx([0.65, 0.75, 0.85])
    assert run.data.tags["finlora.adapter_hash"] == "ab12"
    assert sorted(file.path for file in client.list_artifacts(first.run_id)) == [
        *("adapter", "config.yaml", "plan.txt", "results.jsonl")
    ]
    copies = Path(run.info.artifact_uri.removeprefix("file://"))
    assert tmp_path / "m-files" in copies.parents
    assert (copies / "adapter" / "finlora.yaml").read_text() == "rank: 4\n"


def test_export_equals_live_tracking(tmp_path, store):
    folder = make_run(tmp_path / "live")
    live = TrackedRun(folder, store, lambda: read_view(folder))
    live.update()
    for step in (6, 8):
        add_step(folder, step)
        live.update()
    add_training(folder)
    live.end(None)
    add_evaluation(folder)
    live.end(None)
    never = make_run(tmp_path / "never", steps=())
    shutil.rmtree(never.root)
    shutil.copytree(folder.root, never.root, ignore=shutil.ignore_patterns("tracking"))
    exported = TrackedRun(never, store, lambda: read_view(never))
    exported.end(None)
    client = client_of(store)
    assert exported.run_id != live.run_id
    assert everything(client, exported.run_id) == everything(client, live.run_id)
    before = everything(client, exported.run_id)
    exported.end(None)  # a second export adds nothing
    assert everything(client, exported.run_id) == before


def test_trial_is_nested_in_its_search(tmp_path, store):
    parent = TrackedRun(folder := make_run(tmp_path), store, lambda: read_view(folder))
    parent.update()
    trial = make_run(tmp_path, name="000-4bit")
    link = Parent(parent.run_id, "made")
    nested = TrackedRun(trial, store, lambda: read_view(trial, parent=link))
    nested.end(None)
    client = client_of(store)
    experiment = client.get_experiment_by_name("tests").experiment_id
    found = client.search_runs([experiment], f"tags.mlflow.parentRunId = '{parent.run_id}'")
    assert [run.info.run_id for run in found] == [nested.run_id]


def test_long_values_and_many_points_are_logged_in_parts(tmp_path, store):
    folder = make_run(tmp_path, f"data.tasks=[{'a' * 7000}]", steps=range(1, 402))
    tracked = TrackedRun(folder, store, lambda: read_view(folder))
    tracked.update()  # 6 numbers a step: more than MLflow takes at once
    client = client_of(store)
    assert len(history(client, tracked.run_id)) == 401
    assert client.get_run(tracked.run_id).data.params["data.tasks"] == "a" * 5000


def test_file_that_cannot_be_written_is_named_at_once(tmp_path):
    (tmp_path / "m.db").mkdir()
    store = Store("mlflow", f"sqlite:///{tmp_path / 'm.db'}", "finlora")
    folder = make_run(tmp_path)
    with pytest.raises(ResourceError, match=r"m\.db cannot be written \(unable to open database file\)"):
        TrackedRun(folder, store, lambda: read_view(folder)).update()
