"""Walk through docs/tutorials/own-table.md: each command runs, in its order, from the table to the answer over HTTP.

A tiny base replaces the downloaded one, and a few rows the whole table.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading

import pytest
from shown_commands import DOCUMENTS, ROOT, shown_lines

pytestmark = pytest.mark.ray
PAGE = "docs/tutorials/own-table.md"
FEWER = {
    "train": ("data.max_train_examples=32", "train.epochs=1", "train.num_workers=1"),
    "evaluate": ("data.max_test_examples=8",),
}
"""Settings after the shown ones, by verb."""
MAX_COMMANDS = 10


@pytest.fixture
def reader(dated_base, ray_instance, tmp_path, monkeypatch, call):
    """A checkout with the tiny base at hand, an empty home folder and `finlora` on the path; returns `call`."""
    (tmp_path / "home").mkdir()
    (tmp_path / "bin").mkdir()
    for name, words in (("finlora", "-m finlora.cli.main"), ("python", "")):
        program = tmp_path / "bin" / name
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        program.chmod(0o755)
    for name in ("jobs", "serve_configs", "requirements"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("REAL_BASE", str(dated_base))
    monkeypatch.delenv("FINLORA_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    return call


def edit(path, page):
    """Make the page's changes to the task file: each line of its YAML block replaces the line with the same key."""
    (block,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    text = path.read_text(encoding="utf-8")
    for line in block.splitlines():
        text, count = re.subn(rf"(?m)^{re.escape(line.partition(':')[0])}:.*$", lambda _, line=line: line, text)
        assert count == 1, line
    path.write_text(text, encoding="utf-8")


def type_in_second_terminal(lines, key, port, replies):
    """Run the lines in a shell while the server runs in this process, then end the server as Ctrl-C does."""
    try:
        for line in lines:
            shown = line.replace("KEY=KEY", f"KEY={key}").replace("Bearer KEY", f"Bearer {key}")
            done = subprocess.run(
                ["/bin/bash", "-c", shown.replace(":8000", f":{port}")], capture_output=True, text=True, timeout=60
            )
            replies.append(done.stdout if done.returncode == 0 else f"{line}: {done.stderr}")
    finally:
        os.kill(os.getpid(), signal.SIGINT)


def test_reader_gets_from_a_table_to_an_answer_over_http(reader, tmp_path, monkeypatch):
    if shutil.which("curl") is None:
        pytest.fail("the tutorial uses curl: install it")
    page = DOCUMENTS[PAGE].read_text(encoding="utf-8")
    lines = [line for line in shown_lines(PAGE) if not line.startswith("source ")]
    assert len(lines) <= MAX_COMMANDS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    at_serve = next(number for number, line in enumerate(lines) if line.startswith("finlora serve"))
    key, said, replies = "", {}, []
    for line in lines[:at_serve]:
        program, *words = shlex.split(line)
        if program == "python":
            subprocess.run(["/bin/bash", "-c", line], check=True, timeout=60)
            continue
        verb = words[0]
        code, output, error = reader(*words, *FEWER.get(verb, ()))
        assert (program, code) == ("finlora", 0), f"{line}: {error}"
        said[verb] = output
        if verb == "new-task":
            edit(tmp_path / "letters.yaml", page)
        elif verb == "key":
            key = output.strip()
    assert "majority class" in said["evaluate"]
    assert "not run" not in said["evaluate"]  # the base's score was found

    from finlora.serve.deploy import serve_yaml

    run_server = serve_yaml.run_server

    def run_and_ask(deployment, tell, *rest):
        def watch(text):
            tell(text)
            if "Ctrl-C ends it" in text:
                arguments = (lines[at_serve + 1 :], key, port, replies)
                threading.Thread(target=type_in_second_terminal, args=arguments).start()

        run_server(deployment, watch, *rest)

    monkeypatch.setattr(serve_yaml, "run_server", run_and_ask)
    code, _, error = reader(*shlex.split(lines[at_serve])[1:], "--port", port)
    assert code == 0, error
    asked, curled = replies
    labels = {"cards", "fees", "loans", "online", "service"}
    assert labels <= set(asked.split()), asked
    (result,) = json.loads(curled)["results"]
    assert set(result["probabilities"]) == labels
