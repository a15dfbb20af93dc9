"""The simulation of large clusters: its bytes are those of real runs, its times those worked out by hand, its table the docs'.

That of 0/1 Adam's bytes is compared with ranks over gloo where these are started: tests/optim/test_zero_one_adam.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scaling
from cluster_model import PCIE, Cluster, Link, Load, sample_steps, simulate
from scaling import METHODS, Run, measure, measured_table

from finlora.config import LoraConfig, ModelConfig
from finlora.model.memory.fixed_memory import adapter_sizes
from finlora.model.source import find_source
from finlora.optim.onebit import Schedule, Traffic

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
STEPS = 60
SLOW = Link(name="slow", bytes_per_second=1e6, latency_s=0.01)


def make_load(sizes=(1024, 1040, 21), spread=0.5, jitter=0.02):
    return Load(name="x", sizes=sizes, step_seconds=0.5, spread=spread, jitter=jitter, batch_size=4)


def run(world_size, method, steps=STEPS, load=None, between=SLOW):
    load = load or make_load()
    schedule = Schedule.from_ratio(steps, 0.2, 16)
    return simulate(Cluster(between=between), load, method, schedule, sample_steps(load, world_size, steps))


@pytest.mark.ray
def test_measured_run_sends_what_the_simulation_says(ray_instance, tiny_base, prepared_synthetic, tmp_path):
    measured = measure(tmp_path, tiny_base, prepared_synthetic, "synthetic_sentiment", "adamw", 2, 10)
    sizes = adapter_sizes(find_source(ModelConfig(base=str(tiny_base))).shape, LoraConfig(rank=4))
    load = make_load(sizes=sizes)
    outcome = run(2, "adamw ring", steps=10, load=load)
    assert (measured.bytes_sent, measured.rounds) == (outcome.bytes_sent, outcome.rounds)
    assert measured.rounds == 10
    assert 0 < measured.examples_per_second <= measured.best_per_second
    assert 0 < measured.wire_seconds < 10


@pytest.mark.parametrize("method", METHODS)
def test_lone_gpu_computes_all_the_time_and_sends_nothing(method):
    outcome = run(1, method)
    assert (outcome.efficiency, outcome.bytes_sent, outcome.rounds) == (1.0, 0, 0)


def test_times_of_averages_by_hand():
    """8 GPUs on two nodes, 8,000 elements: ring messages are 4,000 bytes and take 14 ms each."""
    cluster = Cluster(between=SLOW)
    assert cluster.ring_seconds(8, 8000) == pytest.approx(14 * 0.014)
    assert cluster.ring_seconds(4, 8000) == pytest.approx(6 * (PCIE.latency_s + 8000 / PCIE.bytes_per_second))
    assert cluster.tree_seconds(8, 8000) == pytest.approx(2 * 3 * 0.01 + 2 * 32_000 / 1e6)
    traffic = Traffic(8 * 512, 512, 8)
    message = 512 // 8 + 4
    assert traffic.bytes_a_compressed_message == message
    # All-to-all: 7 latencies, and a node's four GPUs send four messages each through its link; then 7 rounds of the ring.
    assert cluster.compressed_seconds(traffic) == pytest.approx(
        7 * 0.01 + 16 * message / 1e6 + 7 * (0.01 + message / 1e6)
    )


def test_efficiency_is_compute_over_all_time_where_ranks_are_equal():
    load = make_load(spread=0.0, jitter=0.0)
    seconds = Cluster(between=SLOW).ring_seconds(8, sum(load.sizes))
    assert run(8, "adamw ring", load=load).efficiency == pytest.approx(0.5 / (0.5 + seconds))
    assert run(8, "adamw free", load=load).efficiency == pytest.approx(1.0)


def test_waiting_grows_with_jitter_and_ranks_and_local_steps_even_it_out():
    calm, rough = make_load(jitter=0.0), make_load(jitter=0.2)
    assert run(8, "adamw free", load=rough).efficiency < run(8, "adamw free", load=calm).efficiency - 0.1
    assert run(32, "adamw free", load=rough).efficiency < run(8, "adamw free", load=rough).efficiency
    free = Link(name="free", bytes_per_second=1e15, latency_s=0.0)
    inside = Cluster(between=free, inside=free)
    schedule, steps = Schedule.from_ratio(400, 0.2, 16), sample_steps(rough, 8, 400)
    one, exact = (simulate(inside, rough, method, schedule, steps) for method in ("0/1 adam", "adamw ring"))
    assert one.efficiency > exact.efficiency + 0.03
    assert np.allclose(steps.mean(), rough.step_seconds, rtol=0.05)


def test_table_of_measured_runs_compares_with_lone_workers():
    same = {"optimiser": "adamw", "rounds": 10, "wire_seconds": 0.05, "steps": 10}
    runs = [
        Run(workers=1, examples_per_second=16.0, best_per_second=20.0, bytes_sent=0, **same),
        Run(workers=2, examples_per_second=25.0, best_per_second=30.0, bytes_sent=5000, **same),
    ]
    assert measured_table(runs)[-1] == "| AdamW | 2 | 25.0 | 30.0 | 75% | 0.5 | 10 of 10 | 5.0 |"


def test_page_shows_what_the_script_prints_and_it_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "simulate", "--plot", str(tmp_path / "plot.png")])
    assert scaling.main() == 0
    page = (ROOT / "docs" / "explanation" / "scaling.md").read_text()
    rows = re.findall(r"^\| (?:\d|8B|70B).*(?:%|Adam) \|$", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(rows) == 22
    assert [row for row in rows if row not in page] == []
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--models", "8b"], "--models '8b': expected SIZE:RANK:EXAMPLES_A_SECOND"),
        (["--models", "9b:4:1"], "with size 8b or 70b"),
        (["--network", "fast"], "--network 'fast': expected NAME:BYTES_A_SECOND:LATENCY_S"),
    ],
)
def test_wrong_option_is_named(options, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "simulate", *options])
    assert scaling.main() == 2
    assert words in capsys.readouterr().err


def test_script_runs_by_itself_with_small_numbers(tmp_path):
    """On a user's own network."""
    small = ["--models", "8b:8:100", "--gpus", "1", "4", "8", "--steps", "20", "--network", "25GbE:2.9e9:10e-6"]
    command = [sys.executable, str(SCRIPT), "simulate", *small, "--plot", str(tmp_path / "plot.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("| 8B rank 8: GPUs | waiting alone | 25GbE: AdamW |")
    assert "\n| 1 | 100% | 100% | 100% | 100% |\n" in done.stdout
    assert (tmp_path / "plot.png").is_file()
