"""`finlora score` as a user types it: engines on Ray, a killed one, the same command again, and another task refused."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import pytest

from finlora.score.folder import ScoreFolder

pytestmark = pytest.mark.ray


def write_table(path, count):
    path.write_text("".join(json.dumps({"text": f"Profit rose by {n} %", "n": n}) + "\n" for n in range(count)))


@pytest.fixture
def score(call, tiny_base, tmp_path, ray_instance):
    def run(*words):
        settings = (f"model.base={tiny_base}", "model.bits=16", "eval.bits=16", "eval.device=cpu")
        sizes = ("model.max_seq_len=256", "model.compute_dtype=float32", f"output_dir={tmp_path}")
        return call("score", *words, "--base", *settings, *sizes)

    return run


def find_engine():
    """Wait for the actor that scores and return its process id."""
    import ray
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address  # without it, the state API takes any Ray of this machine
    for _ in range(600):
        actors = list_actors(address=address, filters=[("state", "=", "ALIVE")])
        found = [actor.pid for actor in actors if "MapWorker" in actor.class_name]
        if found and found[0]:
            return found[0]
        time.sleep(0.1)
    raise AssertionError("no engine started")


def test_killed_engine_changes_no_byte_and_a_second_run_does_nothing(score, tmp_path, monkeypatch):
    monkeypatch.setattr("finlora.score.table.PART_ROWS", {"cpu": 16})
    write_table(tmp_path / "in.jsonl", 160)
    code, said, _ = score(tmp_path / "in.jsonl", tmp_path / "whole.jsonl", "--task", "fpb")
    assert code == 0, said
    assert "Scoring 160 rows in 1 file and 10 parts" in said

    folder = ScoreFolder(tmp_path / "killed.jsonl")

    def kill():
        pid = find_engine()
        while not folder.is_sealed(1):
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    code, said, _ = score(tmp_path / "in.jsonl", folder.out, "--task", "fpb")
    killer.join()
    assert code == 0, said
    assert folder.out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert len(folder.out.read_text().splitlines()) == 160

    written = folder.out.stat().st_mtime_ns
    code, said, _ = score(tmp_path / "in.jsonl", folder.out, "--task", "fpb")
    assert (code, folder.out.stat().st_mtime_ns) == (0, written)
    assert "is complete: an earlier run wrote it with the same table" in said
    code, _, error = score(tmp_path / "in.jsonl", folder.out, "--task", "tfns")
    assert code == 2
    assert "was written by another scoring (task fpb, now tfns" in error
