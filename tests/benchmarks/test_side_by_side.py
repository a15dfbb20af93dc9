"""Benchmarks that compare FinLoRA with transformers: names of works, and a small run of both sides on CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path

import inference
import pytest
import train_throughput
from sides import run_in_process

from finlora.errors import ConfigError

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = {"inference.py": inference, "train_throughput.py": train_throughput}


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
def test_both_sides_run_and_are_compared(
    script, work, sides, options, tiny_base, prepared_synthetic, tmp_path, monkeypatch, capsys
):
    """Each side in this process, by the arguments that its own process would get."""
    path, module = str(SCRIPTS / script), MODULES[script]

    def run_here(script, work, side, argv):
        result = tmp_path / f"{side}.json"
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", [script, *argv, "--works", work, "--run-one", side, "--result", str(result)])
            module.main()
        return json.loads(result.read_text())

    monkeypatch.setattr("sides.run_in_process", run_here)
    arguments = [path, "--works", work, "--sides", *sides, "--device", "cpu", *options, "--base", str(tiny_base)]
    arguments += ["--data", str(prepared_synthetic), "--output", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr("sys.argv", arguments)
    module.main()
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["work"], row["side"]) for row in rows] == [(work, side) for side in sides]
    speeds = [row.get("examples_per_second") or 1 / row["seconds_per_example"] for row in rows]
    assert all(speed > 0 for speed in speeds)
    digits = 1 if script == "inference.py" else 2
    assert f" {speeds[1] / speeds[0]:.{digits}f}  " in capsys.readouterr().out


def test_side_runs_in_a_process_of_its_own(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import json, os, sys\nopen(sys.argv[-1], 'w').write(json.dumps([os.getpid(), sys.argv[1:-1]]))")
    process, arguments = run_in_process(str(script), "a-work", "a-side", ["--device", "cpu"])
    assert process != os.getpid()
    assert arguments == ["--device", "cpu", "--works", "a-work", "--run-one", "a-side", "--result"]


@pytest.mark.parametrize("script", MODULES)
def test_side_that_fails_is_a_row_with_its_last_line(script):
    row = run_in_process(str(SCRIPTS / script), "9b-4bit", "finlora", ["--base", "absent"])
    assert row["error"].startswith("exit 1: finlora.errors.ConfigError: work '9b-4bit': expected SIZE-BITSbit-")
