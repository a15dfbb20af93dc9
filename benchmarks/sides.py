"""One side of a comparison in a process of its own: its memory and its compiled kernels are nobody else's."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any


def run_in_process(script: str, work: str, side: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run a script again for one work and side and return what it wrote to --result; a failure becomes the row's `error`."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
        command = [sys.executable, script, *argv, "--works", work, "--run-one", side, "--result", output.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            return {"error": f"exit {done.returncode}: {lines[-1][:300]}"}
        result: dict[str, Any] = json.loads(output.read())
    return result
