"""Runs in W&B's own offline files."""

from __future__ import annotations

import json
import os
import struct

import pytest
from made_run import add_step, add_training, make_run

from finlora.errors import ConfigError
from finlora.train.tracking.run_view import read_view
from finlora.train.tracking.stores import Store
from finlora.train.tracking.tracked import TrackedRun


def read_records(path):
    """Return the records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def test_resumed_run_keeps_its_id_and_logs_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "true")
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    folder = make_run(tmp_path)
    store = Store("wandb", "offline", "finlora")
    first = TrackedRun(folder, store, lambda: read_view(folder))
    first.end(None)
    add_step(folder, 6)
    add_training(folder)
    second = TrackedRun(folder, store, lambda: read_view(folder))
    second.end(None)
    assert second.run_id == first.run_id
    files = sorted((folder.root / "wandb").glob(f"offline-run-*-{first.run_id}*/*.wandb"))
    records = [record for file in files for record in read_records(file)]
    (settings, *_) = [
        {item.key: json.loads(item.value_json) for item in r.run.config.update} for r in records if r.run.run_id
    ]
    assert settings["lora.rank"] == "4"
    rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item} for r in records]
    assert [(row["optimizer_step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        *((2, 1 / 2), (4, 1 / 4), (6, 1 / 6))
    ]
    assert [row["run/loss_last"] for row in rows if "run/loss_last" in row] == [0.25]
    assert os.environ["WANDB_ERROR_REPORTING"] == "false"
    assert not (tmp_path / "home").exists()


def test_server_without_a_key_is_one_line_and_no_question(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    folder = make_run(tmp_path)
    with pytest.raises(ConfigError, match="WANDB_API_KEY is not set: W&B would ask for the key on the terminal"):
        TrackedRun(folder, Store("wandb", "https://wandb.invalid", "finlora"), lambda: read_view(folder)).update()
