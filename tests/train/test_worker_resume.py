"""Runs that are killed, interrupted or damaged resume with the numbers of an undisturbed run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import EXACT, checkpoints_of, folder_of, losses_of, newest_checkpoint, steps_of, weights_of
from safetensors.torch import load_file

from finlora.errors import CheckpointError, StoppedError

pytestmark = pytest.mark.ray
HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None


def read_mlflow(store):
    """Return what MLflow holds of the only run in a store."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=store)
    (run,) = client.search_runs([client.get_experiment_by_name("finlora").experiment_id])
    loss = client.get_metric_history(run.info.run_id, "train/loss")
    return {
        "id": run.info.run_id,
        "status": run.info.status,
        "params": run.data.params,
        "metrics": run.data.metrics,
        "loss": sorted((point.step, point.value) for point in loss),
        "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
    }


def act_once(at_step, marker, act):
    """Return a worker's body in which worker 0 calls `act` once, after it has recorded `at_step`."""

    def work(loop_config):  # a closure, so Ray sends it by value and workers need no test module
        from finlora.train import worker as there
        from finlora.train.run import recorder

        append = recorder.append_progress

        def append_and_act(folder, progress):
            append(folder, progress)
            if progress.step == at_step and not os.path.exists(marker):  # noqa: PTH110 - a plain path travels by value
                open(marker, "w").close()  # noqa: PTH123
                act()

        recorder.append_progress = append_and_act
        return there._work(loop_config)

    return work


def test_killed_worker_resumes_with_the_uninterrupted_numbers(uninterrupted, configure, monkeypatch, tmp_path):
    """Worker 0 kills itself after step 5, once; the last checkpoint is from step 4 or, not yet registered, before."""
    from finlora.train import worker

    marker = str(tmp_path / "was-killed")
    monkeypatch.setattr(worker, "_work", act_once(5, marker, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    config, said = configure("name=killed", "tracking.mlflow=sqlite:////dev/null/m.db", *EXACT), []
    result = worker.run_training(config, said.append)
    assert [line for line in said if "MLflow" in line] == [  # a store that cannot be written ends no training
        "Warning: MLflow (sqlite:////dev/null/m.db) does not take the run: /dev/null/m.db cannot be written "
        "([Errno 17] File exists: '/dev/null'). The run goes on without it; `finlora export mlflow "
        f"{folder_of(config).root}` logs later what is missing."
    ]
    assert Path(marker).exists()
    lines = [json.loads(line)["step"] for line in folder_of(config).progress.read_text().splitlines()]
    # The checkpoint of step 2 was registered when the worker crashed; that of step 4 may or may not have been.
    assert lines[:5] == [1, 2, 3, 4, 5]
    assert 3 <= lines[5] <= 5
    assert lines[5:] == list(range(lines[5], 7))
    whole, _ = uninterrupted
    assert losses_of(config) == losses_of(whole)
    assert result.loss_curve == [[float(step), loss] for step, loss in losses_of(whole)]
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(config).items())


def test_zero_one_adam_stops_and_resumes_where_workers_agree(configure, ray_instance, monkeypatch, tmp_path):
    """Interrupted at step 23, between two exchanges; resumed, then killed at step 27, again between two.

    30 steps: exact exchanges at 1 to 10, then 1-bit ones at 11 to 20, and at 22, 24, 26, 28 and 30.
    """
    from finlora.train import worker

    settings = [
        *EXACT,
        "optim.name=zero_one_adam",
        "optim.max_local_steps=2",
        "train.epochs=10",
        "train.keep_checkpoints=20",
    ]
    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    whole = configure("name=zero-one-whole", *settings)
    config = configure("name=zero-one", *settings, *([f"tracking.mlflow={store}"] if HAS_MLFLOW else []))
    expected = worker.run_training(whole)
    # Due at each second step and at the ends of epochs of 3 steps; those of 21 and 27 wait for 22 and 28.
    due = [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18, 20, 22, 24, 26, 28, 30]
    assert [steps_of(path) for path in checkpoints_of(whole)] == due
    assert [wire["rounds"] for wire in expected.wire] == [25, 25]
    num_elements = sum(
        tensor.numel() for tensor in load_file(newest_checkpoint(whole) / "adapter.safetensors").values()
    )
    assert [wire["bytes_adam"] for wire in expected.wire] == [30 * 4 * num_elements] * 2
    assert expected.wire[0]["bytes_sent"] == expected.wire[1]["bytes_sent"] > 0

    driver = os.getpid()
    interrupt = lambda: (os.kill(driver, signal.SIGINT), time.sleep(1))  # noqa: E731
    monkeypatch.setattr(worker, "_work", act_once(23, str(tmp_path / "was-interrupted"), interrupt))
    lines = []
    with pytest.raises(StoppedError, match=r"^Stopped by SIGINT at step 24 of 30, which is saved") as stopped:
        worker.run_training(config, lines.append)
    assert stopped.value.exit_code == 130
    assert [line.partition(":")[0] for line in lines] == ["SIGINT"]
    assert steps_of(newest_checkpoint(config)) == 24
    first = HAS_MLFLOW and read_mlflow(store)
    assert not folder_of(config).adapter.exists()

    monkeypatch.setattr(
        worker, "_work", act_once(27, str(tmp_path / "was-killed"), lambda: os.kill(os.getpid(), signal.SIGKILL))
    )
    result = worker.run_training(config)
    steps = [json.loads(line)["step"] for line in folder_of(config).progress.read_text().splitlines()]
    # The checkpoint of step 26 counts only if both workers reported it before the kill.
    assert steps in ([*range(1, 28), *range(27, 31)], [*range(1, 28), *range(25, 31)])
    assert result.loss_curve == expected.loss_curve
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(config).items())
    for ours, theirs in zip(result.wire, expected.wire, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    if HAS_MLFLOW:
        second = read_mlflow(store)
        assert (first["id"], first["status"], second["status"]) == (second["id"], "KILLED", "FINISHED")
        assert [step for step, _ in first["loss"]] == [*range(1, 25)]
        assert second["loss"] == losses_of(whole)
        assert second["params"]["optim.name"] == "zero_one_adam"
        assert second["metrics"]["run/attempts"] == 2
        assert second["files"] == ["adapter", "config.yaml", "plan.txt", "results.jsonl"]


def test_damaged_checkpoint_is_refused_and_the_run_resumes_from_the_one_before(quantised, monkeypatch, tmp_path):
    """A worker's error is raised unchanged, without a restart; then the test follows its advice."""
    from finlora.train import worker

    starts = str(tmp_path / "starts")

    def work(loop_config):
        from finlora.train import worker as there

        with open(starts, "a") as stream:  # noqa: PTH123
            stream.write("x")
        return there._work(loop_config)

    whole, result = quantised
    config = dataclasses.replace(whole, output_dir=str(tmp_path))  # other tests use that run unchanged
    shutil.copytree(folder_of(whole).root, folder_of(config).root)
    newest = newest_checkpoint(config)
    path = newest / "optimizer-1.pt"
    path.write_bytes(path.read_bytes()[:-1])
    words = r"is damaged: optimizer-1.pt is missing or differs from .* Delete that folder to resume from the one before"
    retrying = dataclasses.replace(config, train=dataclasses.replace(config.train, max_failures=3))
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_work", work)
        with pytest.raises(CheckpointError, match=words):
            worker.run_training(retrying)
    assert Path(starts).read_text() == "xx"
    shutil.rmtree(newest)
    lines = []
    again = worker.run_training(config, lines.append)
    assert [line.rpartition("/")[2] for line in lines][-1].startswith("checkpoint_")
    assert lines[0] == f"{newest} is missing."
    assert again.loss_curve == result.loss_curve
