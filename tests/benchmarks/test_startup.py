"""The benchmark of a command's start: its commands are valid settings, its CPU seconds a child's, its table has each number."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import startup
from startup import Start, drop_from_cache, list_commands, list_files, make_table, read_cpu

from finlora.configfile import load_config


def test_commands_are_settings_of_one_run(tmp_path):
    options = argparse.Namespace(
        base=tmp_path, data=tmp_path, task="fiqa", device="cpu", bits=4, eval_bits=8, steps=3, examples=5
    )
    commands = list_commands(options, tmp_path / "out")
    assert tuple(commands) == startup.VERBS
    for verb, words in commands.items():
        assert words[0] == verb
        config = load_config(None, [word for word in words[1:] if "=" in word])
        assert (config.train.max_steps, config.data.max_test_examples, config.eval.device) == (3, 5, "cpu")
        assert Path(config.output_dir) / config.name == tmp_path / "out" / "startup"


def test_cpu_seconds_are_those_of_marked_processes():
    program = "import time\nwhile time.process_time() < 0.4: pass\nprint(flush=True)\ntime.sleep(60)"
    child = subprocess.Popen(
        [sys.executable, "-c", program], env={**os.environ, startup.MARK: "one"}, stdout=subprocess.PIPE
    )
    try:
        child.stdout.readline()
        assert 0.3 <= read_cpu("one")[child.pid] < 20
        assert read_cpu("another") == {}
    finally:
        child.kill()
        child.communicate()


def test_run_of_a_command_that_fails_is_a_row(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(startup, "POLL_S", 0.01)
    began = time.monotonic()
    start = startup.run(Path.cwd(), "train", ["no-such-verb"], tmp_path, tmp_path / "kernels", is_cold=False)
    assert start.exit_code == 2
    assert 0 < start.seconds < time.monotonic() - began
    assert (start.first_step_s, start.started) == (None, "")
    assert "No such command" in capsys.readouterr().err


def test_files_are_dropped_from_the_cache_as_far_as_they_can_be_opened(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/one").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "a/one")
    files = list(list_files([tmp_path]))
    assert files == [tmp_path / "a/one"]
    assert drop_from_cache([*files, tmp_path / "missing"]) == 1
    assert (tmp_path / "a/one").read_text() == "1"


def test_table_has_a_row_for_each_version_and_verb():
    def made(verb, is_cold, seconds, code=0):
        first = seconds - 1 if verb == "train" else None
        return Start(
            checkout="/new", verb=verb, is_cold=is_cold, seconds=seconds, first_step_s=first, cpu_seconds=2 * seconds,
            started="", exit_code=code,
        )  # fmt: skip

    rows = make_table([made("train", True, 30.0), made("train", False, 15.0), made("ask", False, 5.0, code=5)])
    assert rows.splitlines()[2:] == [
        "| /new | train | 30.0 | 15.0 | 29.0 | 14.0 | 60.0 | 30.0 |",
        "| /new | ask |  | exit 5 |  | exit 5 |  | exit 5 |",
    ]
