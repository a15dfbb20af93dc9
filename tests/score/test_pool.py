"""`finlora score` as a user types it: engines on Ray, a killed one, a killed driver, and another task refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from finlora.score.folder import ScoreFolder

pytestmark = pytest.mark.ray
PARTS = 20


def write_table(path, count):
    path.write_text("".join(json.dumps({"text": f"Profit rose by {n} %", "n": n}) + "\n" for n in range(count)))


@pytest.fixture
def score(call, tiny_base, tmp_path, ray_instance):
    def find_words(*words):
        settings = (f"model.base={tiny_base}", "model.bits=16", "eval.bits=16", "eval.device=cpu")
        sizes = ("model.max_seq_len=256", "model.compute_dtype=bfloat16", f"output_dir={tmp_path}")
        return ["score", *map(str, words), "--base", *settings, *sizes]

    def run(*words):
        return call(*find_words(*words))

    run.words = find_words
    return run


def start_driver(words):
    """Start the command in a process of its own, on the Ray of the tests."""
    import ray

    code = (
        "import sys; from finlora.score import table; table.PART_ROWS = {'cpu': 8}; "
        "from finlora.cli.main import main; main(sys.argv[1:])"
    )
    address = ray.get_runtime_context().gcs_address
    environment = os.environ | {"RAY_ADDRESS": address, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-c", code, *words], env=environment)


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


def kill_when_sealed(find_pid, folder, number):
    """Kill a process in another thread when a part is sealed; returns the thread, and a list that gets the parts left then."""
    left = []

    def kill():
        pid = find_pid()
        while not folder.is_sealed(number):
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)
        left.extend(other for other in range(PARTS) if not folder.is_sealed(other))

    killer = threading.Thread(target=kill)
    killer.start()
    return killer, left


def test_killed_engine_or_driver_changes_no_byte_and_a_second_run_does_nothing(score, tmp_path, monkeypatch):
    """Several parts are in progress when the process is killed (PARTS_AT_ONCE)."""
    monkeypatch.setattr("finlora.score.table.PART_ROWS", {"cpu": 8})
    write_table(tmp_path / "in.jsonl", 8 * PARTS)
    code, said, _ = score(tmp_path / "in.jsonl", tmp_path / "whole.jsonl", "--task", "fpb")
    assert code == 0, said
    assert "Scoring 160 rows in 1 file and 20 parts" in said
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert len(whole.splitlines()) == 160

    folder = ScoreFolder(tmp_path / "engine-killed.jsonl")
    killer, left = kill_when_sealed(find_engine, folder, 1)
    code, said, _ = score(tmp_path / "in.jsonl", folder.out, "--task", "fpb")
    killer.join()
    assert code == 0, said
    assert left
    assert folder.out.read_bytes() == whole

    folder = ScoreFolder(tmp_path / "driver-killed.jsonl")
    words = score.words(tmp_path / "in.jsonl", folder.out, "--task", "fpb")
    with start_driver(words) as driver:
        killer, left = kill_when_sealed(lambda: driver.pid, folder, 1)
        assert driver.wait(120) == -signal.SIGKILL
        killer.join()
    assert left
    assert not folder.out.exists()
    code, said, _ = score(tmp_path / "in.jsonl", folder.out, "--task", "fpb")
    assert code == 0, said
    assert "of 160 rows are scored already; scoring the rest." in said
    assert folder.out.read_bytes() == whole

    written = folder.out.stat().st_mtime_ns
    code, said, _ = score(tmp_path / "in.jsonl", folder.out, "--task", "fpb")
    assert (code, folder.out.stat().st_mtime_ns) == (0, written)
    assert "is complete: an earlier run wrote it with the same table" in said
    code, _, error = score(tmp_path / "in.jsonl", folder.out, "--task", "tfns")
    assert code == 2
    assert "was written by another scoring (task fpb, now tfns" in error
