"""The benchmarks that hold FinLoRA beside transformers: names of works, and a small run of both sides on CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import inference
import pytest
import train_throughput

from finlora.errors import ConfigError

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_works_are_read_from_their_names():
    work = inference.parse_work("70b-4bit-ner-32new-16-4stages")
    assert (work.size, work.bits, work.task, work.num_new, work.count, work.num_stages) == ("70b", 4, "ner", 32, 16, 4)
    assert inference.parse_work("8b-8bit-ner-labels-64").num_new == 0
    both = train_throughput.parse_work("8b-4bit-r4-xbrl_tags+xbrl_values-2x2")
    assert (both.tasks, both.micro_batch, both.accumulation) == (("xbrl_tags", "xbrl_values"), 2, 2)
    for module, name in ((inference, "8b-3bit-ner-labels-4"), (train_throughput, "8b-4bit-ner-16")):
        with pytest.raises(ConfigError, match=f"work '{name}': expected SIZE-BITSbit-"):
            module.parse_work(name)


@pytest.mark.parametrize(
    ("script", "work", "sides", "options"),
    [
        ("inference.py", "tiny-16bit-synthetic_sentiment-labels-4", ("plain-8", "finlora"), ["--repeats", "1"]),
        (
            "train_throughput.py",
            "tiny-4bit-r4-synthetic_sentiment-4",
            ("plain", "finlora"),
            ["--repeats", "1", "--steps", "2", "--warm-up", "2"],
        ),
    ],
)
def test_both_sides_run_and_are_compared(script, work, sides, options, tiny_base, prepared_synthetic, tmp_path):
    command = [sys.executable, str(SCRIPTS / script), "--works", work, "--sides", *sides, "--device", "cpu", *options]
    command += ["--data", str(prepared_synthetic), "--base", str(tiny_base), "--output", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["work"], row["side"]) for row in rows] == [(work, side) for side in sides]
    assert not any("error" in row for row in rows), rows
    speeds = [row.get("examples_per_second") or 1 / row["seconds_per_example"] for row in rows]
    assert all(speed > 0 for speed in speeds)
    digits = 1 if script == "inference.py" else 2
    assert f" {speeds[1] / speeds[0]:.{digits}f}  " in done.stdout
