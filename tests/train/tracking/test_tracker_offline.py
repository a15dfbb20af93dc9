"""Offline tracking by the command, where the kernel refuses every internet socket to it and to its child processes."""

from __future__ import annotations

import pytest


def test_mlflow_file_needs_no_socket(offline_export):
    folder, done, database = offline_export
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"MLflow (sqlite:///{database}): run ")
    assert sorted(path.name for path in folder.root.parent.iterdir()) == ["made", "mlflow-files", "mlflow.db"]


def test_offline_wandb_needs_no_socket(tmp_path):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    from conftest import export_without_network

    folder, done, _ = export_without_network("wandb", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("W&B (offline): run ")
    (offline,) = (folder.root / "wandb").glob("offline-run-*")
    assert not (tmp_path / "home").exists()
    assert (offline / "files" / "adapter" / "finlora.yaml").read_text() == "rank: 4\n"
