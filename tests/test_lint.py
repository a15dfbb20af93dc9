"""`make lint`, which CI runs, and the hooks of .pre-commit-config.yaml make the same checks, and each finds its faults."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
RECIPE = re.search(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, flags=re.MULTILINE)[1].splitlines()
KEY = "-----BEGIN RSA " + "PRIVATE KEY-----\n"
SPOILT = {
    "end-of-file": ("page.md", "no newline"),
    "yaml": ("run.yaml", "a: [1\n"),
    "private-keys": ("key.pem", KEY),
    "large-files": ("picture.png", "x" * 260 * 1024),
}


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook["id"])
def test_hook_is_a_line_of_lint(hook):
    command = hook["entry"].replace(".venv/bin/", "$(BIN)/")
    if hook["id"] == "large-files":
        assert "! find $(TREE) -type f -size +250k | grep ." in [line.strip("\t@") for line in RECIPE]
        assert "-size +250k | grep ." in command
    else:
        assert [line for line in RECIPE if line.endswith(command)] != []


def test_lint_has_no_line_beside_the_hooks():
    assert len(RECIPE) == len(HOOKS) == 7
    assert "make lint\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_files_that_lint_looks_at_are_there():
    """A make wildcard silently omits renamed files."""
    tree = re.search(r"^TREE := \$\(wildcard (.*)\)$", MAKEFILE, flags=re.MULTILINE)[1].split()
    assert {"finlora", "tests", "benchmarks", "jobs", "docs", "cluster"} <= set(tree)
    assert [name for name in tree if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("name", SPOILT)
def test_hook_refuses_a_spoilt_file_and_takes_a_sound_one(tmp_path, name):
    (hook,) = [hook for hook in HOOKS if hook["id"] == name]
    file, content = SPOILT[name]
    sound, spoilt = tmp_path / "sound.yaml", tmp_path / file
    sound.write_text("a: 1\n")
    spoilt.write_text(content)
    words = shlex.split(hook["entry"])
    for path, code in ((sound, 0), (spoilt, 1)):
        done = subprocess.run([*words, str(path)], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == code, done.stdout + done.stderr
