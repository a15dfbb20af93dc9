"""Tracking from the driver's thread: a store that fails or hangs costs one line, never the run."""

from __future__ import annotations

import fcntl
import sys
import threading

import pytest
from made_run import Memory, add_step, add_training, make_run

from finlora.configfile import load_config
from finlora.errors import ConfigError, FinloraError, ResourceError, StoppedError
from finlora.train.tracking import following
from finlora.train.tracking.run_view import read_view
from finlora.train.tracking.stores import Store, choose_store, list_stores
from finlora.train.tracking.tracked import TrackedRun


@pytest.fixture
def store(tmp_path):
    return Memory("mlflow", f"memory {tmp_path}", "finlora")


def follow(folder, store, lines, **options):
    return following.following(folder, [TrackedRun(folder, store, lambda: read_view(folder))], lines.append, **options)


def states_of(store):
    (run,) = store.content.runs.values()
    return [state for state, _ in run["states"]]


def fail():
    raise OSError("no route to host")


def test_points_that_are_written_meanwhile_are_logged(tmp_path, store, monkeypatch):
    monkeypatch.setattr(following, "_EVERY_S", 0.01)
    folder, lines = make_run(tmp_path), []
    with follow(folder, store, lines):
        add_step(folder, 6)
        seen = threading.Event()
        store.content.act = seen.set
        assert seen.wait(30)
        add_step(folder, 8)
        add_training(folder)
    (run,) = store.content.runs.values()
    assert [point.step for point in run["points"]] == [2, 4, 6, 8, 8]
    assert (states_of(store), lines) == (["finished"], [])


@pytest.mark.parametrize(
    ("error", "state"), [(StoppedError("by a signal"), "stopped"), (FinloraError("a loss of nan"), "failed")]
)
def test_end_of_a_run_is_told_and_its_error_stays(tmp_path, store, error, state):
    folder = make_run(tmp_path)
    with pytest.raises(type(error), match=str(error)), follow(folder, store, []):
        raise error
    assert states_of(store) == [state]


def test_failing_store_costs_one_line_and_gets_the_rest_when_it_is_back(tmp_path, store, monkeypatch):
    monkeypatch.setattr(following, "_EVERY_S", 0.01)
    monkeypatch.setattr(following, "_RETRY_S", 0.01)
    folder, lines, calls = make_run(tmp_path), [], []
    tried = threading.Event()

    def fail_and_count():
        calls.append(1)
        if len(calls) == 3:
            tried.set()
        fail()

    store.content.act = fail_and_count
    with follow(folder, store, lines):
        assert tried.wait(30)
        store.content.act = lambda: None
    assert lines == [
        "Warning: Memory does not take the run: OSError: no route to host. The run goes on without it; "
        f"`finlora export mlflow {folder.root}` logs later what is missing."
    ]
    (run,) = store.content.runs.values()
    assert [point.step for point in run["points"]] == [2, 4]


def test_store_that_hangs_is_left_behind_after_a_while(tmp_path, store, monkeypatch):
    monkeypatch.setattr(following, "_CLOSE_S", 0.05)
    folder, lines, release = make_run(tmp_path), [], threading.Event()
    store.content.act = release.wait
    with follow(folder, store, lines):
        pass
    assert lines == [
        "Warning: Memory did not answer within 0 s. The run goes on without it; `finlora export mlflow "
        f"{folder.root}` logs later what is missing."
    ]
    release.set()


def test_run_that_another_process_tracks_is_left_to_it(tmp_path, store, monkeypatch):
    monkeypatch.setattr(following, "_LOCK_S", 0.0)
    folder, lines = make_run(tmp_path), []
    folder.tracking.mkdir()
    with (folder.tracking / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with follow(folder, store, lines, is_live=False):
            pass
    assert store.content.runs == {}
    assert lines == [f"{folder.root} is tracked by another process, which logs what is new in the folder as well."]


def test_export_ends_as_the_folder_says_and_names_a_failing_store(tmp_path, store):
    folder = make_run(tmp_path)
    tracked = TrackedRun(folder, store, lambda: read_view(folder))
    following.export(folder, tracked)
    assert states_of(store) == ["stopped"]
    store.content.act = fail
    with pytest.raises(ResourceError, match=r"^Memory does not take the run: OSError: no route to host$"):
        following.export(folder, tracked)


@pytest.mark.parametrize("kind", ["mlflow", "wandb"])
def test_missing_library_is_one_line_that_names_the_extra(tmp_path, monkeypatch, kind):
    monkeypatch.setitem(sys.modules, kind, None)  # as if it were not installed
    monkeypatch.delenv("MLFLOW_DISABLE_TELEMETRY", raising=False)
    folder, lines = make_run(tmp_path), []
    address = f"sqlite:///{tmp_path / 'm.db'}" if kind == "mlflow" else "offline"
    with follow(folder, Store(kind, address, "finlora"), lines):
        pass
    (line,) = lines
    assert f"needs the package {kind}, which is not installed: pip install 'finlora[{kind}]'." in line


def test_stores_of_a_config():
    config = load_config(None, ["tracking.mlflow=sqlite:////m.db", "tracking.wandb=offline", "tracking.project=p"])
    assert [store.kind for store in list_stores(config, is_training=True)] == ["tensorboard", "mlflow", "wandb"]
    assert [store.kind for store in list_stores(config, is_training=False)] == ["mlflow", "wandb"]
    assert [store.kind for store in list_stores(load_config(None), is_training=True)] == ["tensorboard"]
    assert list_stores(load_config(None, ["tracking.tensorboard=false"]), is_training=True) == []


def test_store_of_an_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plain, named = load_config(None), load_config(None, ["tracking.mlflow=sqlite:////m.db"])
    root = tmp_path / "runs" / "made"
    assert choose_store(plain, root, "mlflow", None).address == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert choose_store(named, root, "mlflow", None).address == "sqlite:////m.db"
    assert choose_store(named, root, "mlflow", "sqlite:///own.db").address == f"sqlite:///{tmp_path}/own.db"
    assert choose_store(plain, root, "wandb", None).address == "offline"
    with pytest.raises(ConfigError, match=r"tracking\.mlflow=own\.db: expected sqlite:///PATH"):
        choose_store(named, root, "mlflow", "own.db")
