"""One side of a comparison in its own process, so that memory and compiled kernels are separate."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def run_in_process(script: str, work: str, side: str, argv: Sequence[str]) -> dict[str, Any]:
    """Run a script for one work and side, and return its --result; a failure becomes the row's `error`."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as output:
        command = [sys.executable, script, *argv, "--works", work, "--run-one", side, "--result", output.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            return {"error": f"exit {done.returncode}: {lines[-1][:300]}"}
        result: dict[str, Any] = json.loads(output.read())
    return result


def make_parser(
    description: str | None, works: Sequence[str], sides: Sequence[str], usual_sides: Sequence[str]
) -> argparse.ArgumentParser:
    """Return a parser with the options of all these benchmarks."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", nargs="+", metavar="WORK", default=list(works))
    parser.add_argument("--sides", nargs="+", choices=sides, default=list(usual_sides))
    parser.add_argument("--data", type=Path, default=Path("~/finlora/data").expanduser(), help="prepared tasks")
    parser.add_argument("--base", type=Path, required=True, help="folder with config.json, or with 8b/ and 70b/ in it")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model, if the base's folder has no tokenizer")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--output", type=Path, help="JSON lines file to append to")
    parser.add_argument("--run-one", choices=sides, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser


def compare(
    script: str,
    options: argparse.Namespace,
    widths: tuple[int, int],
    show: Callable[[dict[str, Any], dict[str, Any]], str],
) -> None:
    """Run every work on every side, print a line each, and append it to the output.

    Args:
        widths: columns of the works' and the sides' names.
        show: returns the rest of a line from a row and the reference, the row of the work's first side that did not fail.
    """
    for work in options.works:
        reference: dict[str, Any] = {}
        for side in options.sides:
            row = run_in_process(script, work, side, sys.argv[1:])
            reference = reference or ({} if "error" in row else row)
            line = row["error"] if "error" in row else show(row, reference)
            print(f"{work:{widths[0]}} {side:{widths[1]}} {line}", flush=True)
            if options.output:
                with options.output.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"work": work, "side": side} | row) + "\n")
