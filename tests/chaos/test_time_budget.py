"""A check with a time budget ends in time, leaves no process behind, and shows what was judged so far."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.chaos.time_budget import Need, share_out

ROOT = Path(__file__).resolve().parents[2]
# A part that records one fault, starts a detached process (own session, orphaned), and never ends.
ENDLESS_PART = """
import os, subprocess, sys, time
from tests.chaos.record import Injection, Tally
from pathlib import Path
record = next(word.partition("=")[2] for word in sys.argv if word.startswith("--record="))
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        Path(os.environ["PIDS"]).open("a").write(f"{os.getpid()}\\n")
        time.sleep(600)
    os._exit(0)
os.wait()
Path(os.environ["PIDS"]).open("a").write(f"{os.getpid()}\\n")
while len(Path(os.environ["PIDS"]).read_text().split()) % 2:
    time.sleep(0.05)
(Path(os.environ["TMPDIR"]) / "left").touch()
Tally(Path(record), 0).add(Injection("killed", sys.argv[1], 7, "resumes"))
time.sleep(600)
"""
CHECK = """
import sys
import tests.chaos.__main__ as chaos
from tests.chaos.time_budget import Need
chaos.NEEDS = {part: Need(1, 1) for part in chaos.PARTS} | {"train": Need(900, 900)}
chaos.RESERVE_S = dict.fromkeys(chaos.PARTS, 0.0)
chaos.END_S = 0.0
chaos.command_of = lambda part: [sys.executable, "-c", open(sys.argv[1]).read(), part]
sys.exit(chaos.main(sys.argv[2:]))
"""


@pytest.fixture
def check(tmp_path):
    """Start fault injection with endless parts; killed at the end of the test."""
    (tmp_path / "part.py").write_text(ENDLESS_PART)
    started = []

    def start(*options):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PIDS": str(tmp_path / "pids")}
        command = [
            sys.executable,
            "-c",
            CHECK,
            str(tmp_path / "part.py"),
            "--table",
            str(tmp_path / "table.md"),
            *options,
        ]
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def is_left(pids):
    return [pid for pid in map(int, pids.read_text().split()) if psutil.pid_exists(pid)]


def test_parts_end_at_their_limit_with_all_processes(check, tmp_path):
    process = check("--parts", "files", "train", "serve", "--minutes", "0.15")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0
    assert output.startswith("seed 0, at most 0.15 minutes in total: files 4 s, train skipped, serve 4 s\n")
    assert "train: skipped, it needs at least 900 s" in output
    assert output.count("s; faults not judged by then do not count") == 2
    assert "2 faults in " in output
    assert "| killed | serve | 1 | resumes | 0 |" in (tmp_path / "table.md").read_text()
    assert len((tmp_path / "pids").read_text().split()) == 4
    assert is_left(tmp_path / "pids") == []
    assert list(Path("/tmp").glob("fl-*/left")) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_kills_all_processes_and_keeps_the_table(check, tmp_path, number):
    record = tmp_path / "faults.jsonl"
    process = check("--parts", "files", "serve", "--minutes", "30", "--record", str(record))
    until = time.monotonic() + 60
    while not (record.exists() and record.read_text().endswith("\n")):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}: all started processes were killed" in output
    assert "| killed | files | 1 | resumes | 0 |" in (tmp_path / "table.md").read_text()
    assert is_left(tmp_path / "pids") == []


def test_parts_get_their_minimum_and_share_the_rest_by_usual_time():
    needs = {"small": Need(10, 30), "large": Need(100, 90), "huge": Need(500, 900)}
    assert share_out(needs, 5) == {}
    assert share_out(needs, 50) == {"small": 50}
    assert share_out(needs, 230) == {"small": 40, "large": 190}
    assert sum(share_out(needs, 1000).values()) == pytest.approx(1000)


def test_fuzz_prints_total_and_skipped_targets_and_ends_at_a_signal(tmp_path):
    targets = ("arrow", "manifest", "parquet")
    command = [
        sys.executable,
        "-m",
        "tests.fuzz",
        "--targets",
        *targets,
        "--engine",
        "random",
        "--found",
        str(tmp_path / "found"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [*command, "--minutes", "0.5"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[0]
    assert ", 2 targets in at most 0.5 minutes in total: 15 s each, start-up included" in lines[0]
    assert lines[1] == "skipped, since a target needs at least 15 s: parquet\n"
    assert rest.splitlines()[0] == "stopped by SIGTERM: the running target was killed"
    assert rest.splitlines()[1].startswith("0 of 2 targets in ")
    assert process.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["found"]


def test_signal_to_a_check_in_one_process_kills_all_it_started(tmp_path):
    """The way soak, node_failure and search_failure run."""
    script = (
        "import subprocess, sys, time\nfrom tests.chaos.time_budget import run_to_end\n"
        "def check():\n"
        "    shell = ['sh', '-c', 'setsid sleep 600 >/dev/null 2>&1 & echo $!']\n"
        "    print(subprocess.check_output(shell, text=True), flush=True)\n"
        "    time.sleep(600)\n"
        "sys.exit(run_to_end(check))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        pid = int(process.stdout.readline())
        assert psutil.pid_exists(pid)
        process.send_signal(signal.SIGHUP)
        rest = process.communicate(timeout=60)[0]
    assert process.returncode == 129
    assert "stopped by SIGHUP: all started processes were killed" in rest
    assert not psutil.pid_exists(pid)
