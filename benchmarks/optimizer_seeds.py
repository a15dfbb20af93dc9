"""AdamW and 0/1 Adam on a real base: accuracy, loss and bytes sent, over tasks, numbers of workers and seeds.

    python benchmarks/optimizer_seeds.py --base BASE --data DATA --output OUT --workers 2 --at-once 6 --minutes 9      # resumes
    python benchmarks/optimizer_seeds.py --base BASE --data DATA --output OUT --workers 2 4 --device cpu --tasks fpb \\
        --seeds 0 1 --set train.max_steps=4 data.max_train_examples=64 data.max_test_examples=24
    python benchmarks/optimizer_seeds.py --output OUT --table

A row is jobs/configs/smollm2-135m-4bit-r4-TASK.yaml with an optimiser, a rate and a number of workers: `finlora reproduce`
runs such steps, and its runner trains and scores these. Workers of a run share one GPU, so they talk over gloo. Rates are given,
not searched for: AdamW's is that of the configs, 0/1 Adam's 1.4 times as high.

The table pairs the seeds: a difference is the mean over seeds of 0/1 Adam's accuracy less AdamW's, with its 95 % interval by
Student's t, in points. Bytes are those sent by a worker over a run, as a share of a float32 all-reduce at each step. Exit code 2:
rows are left, since the time was over; 1: one failed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison import render_table

from finlora.reproduce.outcomes import StepState, delete_weights
from finlora.reproduce.step import Step, identify_base, train_and_evaluate
from finlora.results import Result, read_results

ROOT = Path(__file__).resolve().parents[1]
TITLES = {"adamw": "AdamW", "zero_one_adam": "0/1 Adam"}
RATES = {"adamw": 5e-4, "zero_one_adam": 7e-4}
TASKS = ("fpb", "tfns", "ner")


def plan(options: argparse.Namespace) -> Iterator[Step]:
    """Return the trainings and evaluations, all optimisers of a seed together, so that a part of the plan has whole pairs."""
    from finlora.configfile import load_config
    from finlora.precision import resolve_training
    from finlora.reproduce.public_rows import FAMILY
    from finlora.train.run.run_folder import resolve_paths

    base_id = ""
    for seed in options.seeds:
        for workers in options.workers:
            for task in options.tasks:
                for optimizer in TITLES:
                    settings = [
                        *(
                            f"name={task}-{optimizer}-w{workers}-seed{seed}",
                            f"seed={seed}",
                            f"model.base={options.base}",
                        ),
                        *(f"optim.name={optimizer}", f"optim.learning_rate={rate_of(options, optimizer)}"),
                        *(f"train.num_workers={workers}", f"output_dir={options.output / 'runs'}"),
                        *(
                            f"data.dir={options.data}",
                            f"train.device={options.device}",
                            f"eval.device={options.device}",
                        ),
                        *shares(options.at_once, workers, options.gpus if options.device == "cuda" else 0),
                        *options.set,
                    ]
                    yaml = ROOT / "jobs" / "configs" / f"{FAMILY}-{task}.yaml"
                    config = resolve_training(resolve_paths(load_config(yaml, settings)))
                    base_id = base_id or identify_base(config.model)
                    yield from train_and_evaluate(config, base_id)


def rate_of(options: argparse.Namespace, optimizer: str) -> float:
    """Return an optimiser's learning rate: the given one, or its entry of RATES."""
    return dict(options.rates).get(optimizer, RATES[optimizer])


def shares(at_once: int, workers: int, gpus: int) -> list[str]:
    """Return the settings that let `at_once` steps share the GPUs, each training with all its workers; none without a GPU."""
    if not gpus:
        return []
    share = gpus / at_once
    # Ray counts GPUs in steps of 0.0001. Below 1 the workers talk over gloo: NCCL refuses two on one GPU.
    worker = min(math.floor(1e4 * share / workers) / 1e4, 0.5)
    return [f"train.gpus_per_worker={worker}", f"eval.num_gpus={min(math.floor(1e4 * share) / 1e4, 1.0)}"]


def pair(results: Sequence[Result]) -> dict[tuple[str, int], dict[str, dict[int, tuple[Result, Result]]]]:
    """Return (task, workers) -> optimiser -> seed -> (training, evaluation), of the runs that have both."""
    trainings = {result.run: result for result in results if result.kind == "training"}
    pairs: dict[tuple[str, int], dict[str, dict[int, tuple[Result, Result]]]] = {}
    for scored in results:
        training = trainings.get(scored.run)
        if scored.kind != "evaluation" or training is None:
            continue
        config: Mapping[str, Any] = training.config
        row = pairs.setdefault((scored.task, config["train"]["num_workers"]), {})
        row.setdefault(config["optim"]["name"], {})[config["seed"]] = (training, scored)
    return pairs


def difference(pairs: Mapping[str, Mapping[int, tuple[Result, Result]]]) -> tuple[float, float, int]:
    """Return the mean over common seeds of 0/1 Adam's accuracy less AdamW's in points, half its 95 % interval, and the seeds.

    The half is nan for fewer than two seeds.
    """
    from scipy.stats import t

    adamw, zero_one = (pairs.get(name, {}) for name in TITLES)
    seeds = sorted(set(adamw) & set(zero_one))
    gaps = [100 * (zero_one[seed][1].metrics["accuracy"] - adamw[seed][1].metrics["accuracy"]) for seed in seeds]
    if len(gaps) < 2:
        return (gaps[0] if gaps else math.nan), math.nan, len(gaps)
    half = float(t.ppf(0.975, len(gaps) - 1)) * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return statistics.mean(gaps), half, len(gaps)


def render(results: Sequence[Result]) -> str:
    """Return the table of all rows that are done."""
    rows = []
    for (task, workers), pairs in sorted(pair(results).items()):
        for optimizer, title in TITLES.items():
            runs = [run for _, run in sorted(pairs.get(optimizer, {}).items())]
            if not runs:
                continue
            scores = [100 * scored.metrics["accuracy"] for _, scored in runs]
            spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            sent = sum(wire["bytes_sent"] for training, _ in runs for wire in training.wire)
            full = sum(wire["bytes_adam"] for training, _ in runs for wire in training.wire)
            mean, half, num_pairs = difference(pairs)
            rows.append(
                [
                    *(task, str(workers), title, f"{runs[0][0].config['optim']['learning_rate']:g}"),
                    ", ".join(f"{score:.1f}" for score in scores),
                    f"{statistics.mean(scores):.1f}{spread}",
                    "" if optimizer == "adamw" else f"{mean:+.2f} ± {half:.2f} ({num_pairs} seeds)",
                    f"{statistics.mean(last_quarter(training) for training, _ in runs):.4f}",
                    f"{sent / full:.1%}" if full else "",
                    f"{statistics.mean(training.wall_seconds or math.nan for training, _ in runs):.0f}",
                ]
            )
    header = [
        "task",
        "workers",
        "optimiser",
        "rate",
        "accuracy % by seed",
        "mean",
        "less AdamW's",
        "loss, last quarter",
    ]
    return render_table("AdamW and 0/1 Adam", [*header, "bytes", "wall s"], rows)


def last_quarter(training: Result) -> float:
    """Return the mean loss of the last quarter of a training's points."""
    losses = [loss for _, loss in training.loss_curve]
    return statistics.mean(losses[3 * len(losses) // 4 :])


def run(options: argparse.Namespace) -> int:
    """Run what is left of the plan; returns the exit code."""
    deadline = time.monotonic() + 60 * options.minutes if options.minutes else None
    from finlora.cluster import connect

    steps = list(plan(options))
    connect.connect(log_to_driver=False)
    from finlora.reproduce.at_once import run_plan

    ended = run_plan(steps, options.output, print, at_once=options.at_once, deadline=deadline)
    delete_weights(steps, {outcome.name: outcome for outcome in ended.outcomes})
    bad = [each for each in ended.outcomes if each.state in (StepState.FAILED, StepState.CANNOT_RUN, StepState.WAITS)]
    for outcome in bad:
        print(f"{outcome.name}: {outcome.state}: {outcome.cause}")
    return 2 if ended.stop else bool(bad)


def _read_rate(text: str) -> tuple[str, float]:
    name, _, rate = text.partition("=")
    if name not in TITLES:
        raise argparse.ArgumentTypeError(f"{text}: expected one of {', '.join(TITLES)}, = and a rate")
    return name, float(rate)


def main() -> int:
    """Run the plan and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base", type=Path)
    add("--data", type=Path, help="folder of prepared tasks")
    add("--output", type=Path, required=True)
    add("--tasks", nargs="+", default=TASKS)
    add("--seeds", nargs="+", type=int, default=range(5))
    add("--workers", nargs="+", type=int, default=(2, 4))
    add("--rates", nargs="+", type=_read_rate, default=(), help="such as zero_one_adam=1e-3")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--gpus", type=int, default=1)
    add("--at-once", type=int, default=1)
    add("--minutes", type=float, help="stop after so many; the same call goes on")
    add("--table", action="store_true", help="run nothing: print the table of what is done")
    add("--set", nargs="*", default=[], help="further settings, as key=value")
    options = parser.parse_args()
    options.output = options.output.resolve()
    if not options.table and (options.base is None or options.data is None):
        parser.error("--base and --data are needed to run; --table prints what is done")
    code = 0 if options.table else run(options)
    print(render(read_results(options.output / "runs")))
    return code


if __name__ == "__main__":
    sys.exit(main())
