"""Scaling of training: measured on this machine's cores, and simulated up to 1,024 GPUs.

    python benchmarks/scaling.py measure                                        # 6 runs, about 6 minutes on two cores
    python benchmarks/scaling.py measure --data ~/finlora/data --task ner       # ragged real examples
    python benchmarks/scaling.py simulate --plot docs/explanation/scaling.png   # seconds
    python benchmarks/scaling.py simulate --models 70b:4:8.5 --spread 0.2 --network 25GbE:2.9e9:10e-6

`measure` trains with each number of workers and each optimiser through Ray Train and DeepSpeed over gloo, 16 examples a worker
and step (weak scaling), and prints examples a second and a worker's traffic for the optimiser. `simulate` prints the share of
time in which GPUs compute; cluster_model.py states its assumptions. Its inputs are a GPU's examples a second, the spread of
example lengths, and the links.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster_model import ETHERNET_10, ETHERNET_100, Cluster, Link, Load, Method, sample_steps, simulate

from finlora.config import LoraConfig, OptimConfig
from finlora.configfile import load_config
from finlora.errors import ConfigError
from finlora.formula.llama import LLAMA_8B, LLAMA_70B
from finlora.model.memory.fixed_memory import adapter_sizes
from finlora.optim.onebit import Schedule

BATCH = 16
"""Examples a rank and step."""
OPTIMISERS = ("adamw", "zero_one_adam")
METHODS: tuple[Method, ...] = ("adamw free", "adamw ring", "adamw tree", "0/1 adam")
SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B}
MODELS = ("8b:4:140", "70b:4:8.5")
"""Size, rank, and examples a second of one GPU: NER at 4 bit on an H100 (docs/reference/performance.md)."""
SPREAD = 0.54
"""Spread of tokens an example: NER's published train split with Llama 3's tokenizer, mean 94, longest 499."""
JITTER = 0.02
"""Assumed spread of a GPU's times of the same work."""
GPUS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BASE = (
    *("vocab_size=2048", "hidden_size=128", "intermediate_size=384", "num_layers=2", "num_heads=4", "num_kv_heads=2"),
    *("context_length=128", "batch_size=4", "num_steps=20"),
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One measured training; bytes, rounds and seconds on the wire are for one worker and all steps."""

    optimiser: str
    workers: int
    examples_per_second: float
    """Rate at the median step."""
    best_per_second: float
    """Rate at the fastest tenth of the steps, which other programs disturbed least."""
    bytes_sent: int
    rounds: int
    wire_seconds: float
    """Smallest over workers: the others' include waits for the slowest."""
    steps: int


def measure(folder: Path, base: Path, data: Path, task: str, optimiser: str, workers: int, steps: int) -> Run:
    """Train on the connected Ray and read the run's records; the first tenth of the steps is warm-up and not timed."""
    from finlora.train.run.progress import read_progress
    from finlora.train.run.run_folder import RunFolder
    from finlora.train.worker import run_training

    name = f"{optimiser}-{workers}"
    config = load_config(
        None,
        [
            *(f"name={name}", f"output_dir={folder}", f"model.base={base}", f"data.dir={data}", f"data.tasks=[{task}]"),
            *("model.bits=16", "model.compute_dtype=float32", "train.precision=fp32", "train.device=cpu"),
            *(f"train.num_workers={workers}", f"train.global_batch_size={BATCH * workers}", f"optim.name={optimiser}"),
            # Reserves half a core, so that four workers fit on two cores; each computes in one thread.
            *("train.cpus_per_worker=0.5", f"train.max_steps={steps}", "train.epochs=1000", "train.log_every_steps=1"),
            *("train.checkpoint_every_steps=null", "lora.rank=4"),
        ],
    )
    result = run_training(config, lambda _line: None)
    timed = read_progress(RunFolder(folder / name))[steps // 10 :]
    seconds = [BATCH * workers / record.examples_per_second for record in timed]
    tenths = statistics.quantiles(seconds, n=10)
    return Run(
        optimiser=optimiser,
        workers=workers,
        examples_per_second=BATCH * workers / statistics.median(seconds),
        best_per_second=BATCH * workers / tenths[0],
        bytes_sent=max((worker["bytes_sent"] for worker in result.wire), default=0),
        rounds=max((worker["rounds"] for worker in result.wire), default=0),
        wire_seconds=min((worker["seconds"] for worker in result.wire), default=0.0),
        steps=steps,
    )


def measured_table(runs: Sequence[Run]) -> list[str]:
    """Return the lines of the table of measured runs, in Markdown."""
    alone = {run.optimiser: run.best_per_second for run in runs if run.workers == 1}
    lines = [
        "| optimiser | workers | examples/s | at best | of lone workers | KB sent a step | rounds | ms on the wire a step |",
        f"|{' --- |' * 8}",
    ]
    for run in runs:
        share = run.best_per_second / (run.workers * alone[run.optimiser]) if run.optimiser in alone else None
        cells = (
            *("AdamW" if run.optimiser == "adamw" else "0/1 Adam", f"{run.workers}"),
            *(f"{run.examples_per_second:.1f}", f"{run.best_per_second:.1f}", "" if share is None else f"{share:.0%}"),
            *(f"{run.bytes_sent / run.steps / 1e3:.1f}", f"{run.rounds} of {run.steps}"),
            f"{1e3 * run.wire_seconds / run.steps:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def run_measurements(options: argparse.Namespace) -> None:
    """Train on a local Ray that FinLoRA starts."""
    import torch

    from finlora.cluster import connect as cluster
    from finlora.data.pretraining.generated_texts import pretraining_texts
    from finlora.data.sets.prepare import prepare_task
    from finlora.model.pretrain import PretrainConfig, pretrain_base

    with tempfile.TemporaryDirectory(prefix="finlora-scaling-") as name:
        folder = Path(name)
        data = options.data.resolve() if options.data else folder / "data"  # workers run in another folder
        if options.data is None:
            prepare_task(options.task, None, data, None, "all", False, False)
        settings = {key: int(value) for key, value in (text.split("=") for text in BASE)}
        texts, base = pretraining_texts(1, 400), folder / "base"
        pretrain_base(texts, PretrainConfig(**settings), base, torch.device("cpu"), lambda _step, _loss: None)
        cluster.connect(log_to_driver=False)
        runs = []
        for optimiser in options.optimisers:
            for workers in options.workers:
                runs.append(measure(folder / "runs", base, data, options.task, optimiser, workers, options.steps))
                print(json.dumps(asdict(runs[-1])), file=sys.stderr, flush=True)
        print("\n".join(measured_table(runs)))


def read_load(text: str, spread: float, jitter: float) -> Load:
    """Read SIZE:RANK:EXAMPLES_A_SECOND.

    Raises:
        ConfigError: it has another form.
    """
    try:
        size, rank, speed = text.split(":")
        sizes = adapter_sizes(SHAPES[size], LoraConfig(rank=int(rank)))
        return Load(
            name=f"{size.upper()} rank {rank}",
            sizes=sizes,
            step_seconds=BATCH / float(speed),
            batch_size=BATCH,
            spread=spread,
            jitter=jitter,
        )
    except (ValueError, KeyError, ZeroDivisionError):
        raise ConfigError(
            f"--models {text!r}: expected SIZE:RANK:EXAMPLES_A_SECOND with size 8b or 70b, e.g. {MODELS[0]}"
        ) from None


def read_link(text: str) -> Link:
    """Read NAME:BYTES_A_SECOND:LATENCY_S.

    Raises:
        ConfigError: it has another form.
    """
    try:
        name, rate, latency = text.split(":")
        return Link(name=name, bytes_per_second=float(rate), latency_s=float(latency))
    except ValueError:
        raise ConfigError(
            f"--network {text!r}: expected NAME:BYTES_A_SECOND:LATENCY_S, e.g. 25GbE:2.9e9:10e-6"
        ) from None


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Efficiency over the number of GPUs of one load on one network."""

    load: Load
    cluster: Cluster
    gpus: Sequence[int]
    efficiency: dict[Method, list[float]]


def simulate_curves(
    loads: Sequence[Load], networks: Sequence[Link], gpus: Sequence[int], num_steps: int
) -> list[Curve]:
    """Run every method on every cluster; 0/1 Adam with a config's default settings."""
    optim = OptimConfig()
    schedule = Schedule.from_ratio(num_steps, optim.freeze_ratio, optim.max_local_steps)
    curves = []
    for load in loads:
        samples = {n: sample_steps(load, n, num_steps) for n in gpus}
        for network in networks:
            cluster = Cluster(between=network)
            found = {
                method: [simulate(cluster, load, method, schedule, samples[n]).efficiency for n in gpus]
                for method in METHODS
            }
            curves.append(Curve(load=load, cluster=cluster, gpus=gpus, efficiency=found))
    return curves


def efficiency_table(curves: Sequence[Curve]) -> list[str]:
    """Return the lines of the table of one load, in Markdown: a row a number of GPUs."""
    load, gpus = curves[0].load, curves[0].gpus
    heads = [f"{curve.cluster.between.name}: {name}" for curve in curves for name in ("AdamW", "as a tree", "0/1 Adam")]
    lines = [
        f"| {load.name}: GPUs | waiting alone | {' | '.join(heads)} |",
        f"|{' --- |' * (len(heads) + 2)}",
    ]
    for row, num_gpus in enumerate(gpus):
        cells = [f"{num_gpus:,}", f"{curves[0].efficiency['adamw free'][row]:.0%}"]
        cells += [f"{curve.efficiency[method][row]:.0%}" for curve in curves for method in METHODS[1:]]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Plot efficiency over GPUs: a column a network, a row a load."""
    from finlora.report.plots import COLOURS, GREY, new_grid, save_figure

    networks = list(dict.fromkeys(curve.cluster.between.name for curve in curves))
    figure, rows = new_grid(len(curves) // len(networks), len(networks), 9.6, 3.5 * len(curves) // len(networks) + 0.6)
    values = [value for curve in curves for found in curve.efficiency.values() for value in found]
    lowest = max(0, int(10 * min(values)) * 10 - 10)
    styles: dict[Method, dict[str, Any]] = {
        "adamw free": {"color": GREY, "linestyle": "--", "label": "only waiting for the slowest (AdamW)"},
        "adamw ring": {"color": COLOURS[5], "marker": "o", "label": "AdamW, ring"},
        "adamw tree": {"color": COLOURS[1], "marker": "s", "label": "AdamW, tree"},
        "0/1 adam": {"color": COLOURS[0], "marker": "^", "label": "0/1 Adam"},
    }
    for axes, curve in zip([axes for row in rows for axes in row], curves, strict=True):
        for method, style in styles.items():
            shares = [100 * value for value in curve.efficiency[method]]
            axes.plot(curve.gpus, shares, linewidth=1.8, markersize=4.5, clip_on=False, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(curve.gpus), [f"{n:,}" for n in curve.gpus], fontsize=9, rotation=45)
        axes.minorticks_off()
        axes.set_ylim(lowest, 102)
        axes.set_yticks(range(lowest, 101, 10))
        axes.grid(color="#E6E6E6")
        axes.set_title(f"{curve.load.name}, {curve.cluster.between.name} between nodes", fontsize=11.5, loc="left")
    for axes in rows[-1]:
        axes.set_xlabel("GPUs, four a node", fontsize=11)
    for row in rows:
        row[0].set_ylabel("time spent computing, %", fontsize=11)
    handles, labels = rows[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, fontsize=9.5, frameon=False)
    save_figure(figure, path)


def run_simulation(options: argparse.Namespace) -> None:
    """Print the tables, and write the plot if --plot is given."""
    loads = [read_load(text, options.spread, options.jitter) for text in options.models]
    networks = [read_link(text) for text in options.network] or [ETHERNET_10, ETHERNET_100]
    curves = simulate_curves(loads, networks, options.gpus, options.steps)
    for number, load in enumerate(loads):
        own = curves[number * len(networks) : (number + 1) * len(networks)]
        print("\n".join(efficiency_table(own)))
        print(f"\n{load.step_seconds:.3f} s a step, {sum(load.sizes):,} parameters in {len(load.sizes)} tensors.\n")
    if options.plot:
        plot(curves, options.plot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    measuring = kinds.add_parser("measure")
    measuring.set_defaults(run=run_measurements)
    measuring.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    measuring.add_argument("--optimisers", nargs="+", choices=OPTIMISERS, default=list(OPTIMISERS))
    measuring.add_argument("--steps", type=int, default=100)
    measuring.add_argument("--data", type=Path, help="prepared tasks; default: generated")
    measuring.add_argument("--task", default="synthetic_sentiment")
    simulating = kinds.add_parser("simulate")
    simulating.set_defaults(run=run_simulation)
    simulating.add_argument("--models", nargs="+", metavar="SIZE:RANK:EXAMPLES_A_SECOND", default=list(MODELS))
    simulating.add_argument("--spread", type=float, default=SPREAD, help="of the examples' lengths, over their mean")
    simulating.add_argument("--jitter", type=float, default=JITTER, help="of the time of the same work, over its mean")
    simulating.add_argument("--network", nargs="+", metavar="NAME:BYTES_A_SECOND:LATENCY_S", default=[])
    simulating.add_argument("--gpus", type=int, nargs="+", default=list(GPUS))
    simulating.add_argument("--steps", type=int, default=1000, help="optimiser steps of the run")
    simulating.add_argument("--plot", type=Path, help="PNG file to write")
    options = parser.parse_args()
    try:
        options.run(options)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
