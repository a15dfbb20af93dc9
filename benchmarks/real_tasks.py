"""Main experiment on real data, each step a job on a running Ray cluster: base, adapters at 16, 8 and 4 bit, optimisers.

    ray start --head                                                # with RAY_AUTH_MODE=token if others can reach it
    python benchmarks/real_tasks.py --source RAW --output OUT       # RAW/fpb and RAW/tfns hold the raw files
    python benchmarks/real_tasks.py --source RAW --output OUT --parts adapters --text headline ner

A small Llama base is pretrained on the unlabelled train inputs; then each adapter is trained and scored on the full test split,
and AdamW is compared with 0/1 Adam with two workers a run. Finished jobs are kept: the same command with the same output folder
continues after the time limit stopped it. Exit code 1: a job failed; 2: the time limit was reached.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from comparison import (
    check_adapters,
    check_optimizers,
    compare_adapters,
    compare_optimizers,
    plot_optimizers,
)
from job_queue import Job, JobQueue, Outcome

from finlora.errors import ResultError
from finlora.results import Result, read_results

ROOT = Path(__file__).resolve().parents[1]
# Few wide layers: kernel launches bound the steps of so small a model, and their number grows only with the layers.
PRETRAIN = (
    *("vocab_size=8192", "hidden_size=640", "intermediate_size=1760", "num_layers=4", "num_heads=10"),
    *("num_kv_heads=5", "batch_size=64", "context_length=256", "num_steps=1200", "learning_rate=1e-3"),
)
SOURCES = {"fiqa": "fiqa_sa"}
"""Raw folders whose name differs from the task's."""
REPORT_SECONDS = 15.0
"""Part of the time limit reserved for tables and plots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Training schedule of a task."""

    global_batch_size: int
    epochs: int
    learning_rate: float


# 1e-3 at batch 16 worked in earlier runs, 4e-3 collapsed to the majority class. TFNS has 9,543 rows: twice the batch at the rate
# times the root of two gives about as many steps (897) as FPB's 3,634 rows (912), so that all runs end together.
SCHEDULES = {
    "tfns": Schedule(global_batch_size=32, epochs=3, learning_rate=1.4e-3),
    "fpb": Schedule(global_batch_size=16, epochs=4, learning_rate=1e-3),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training and the evaluation of its adapter."""

    part: str
    task: str
    seed: int
    bits: int = 4
    lora_rank: int = 4
    optimizer: str = "adamw"
    num_workers: int = 1

    @property
    def name(self) -> str:
        return f"{self.task}-{self.bits}bit-r{self.lora_rank}-{self.optimizer}-s{self.seed}"


def plan_adapters(options: argparse.Namespace) -> list[Run]:
    """Return a run for each task and precision. The 4-bit run is also AdamW's first seed, so it has as many workers."""
    runs = []
    for task in options.tasks:
        shared = Run(part="adapters", task=task, seed=options.seeds[0], num_workers=options.workers)
        single = replace(shared, num_workers=1)
        runs += [replace(single, bits=8, lora_rank=8), replace(single, bits=16)] if "adapters" in options.parts else []
        runs.append(shared)
    return runs


def plan_optimizers(options: argparse.Namespace) -> list[Run]:
    """Return a run for each task, seed and optimiser, without those of the adapters' part."""
    return [
        Run(part="optimizers", task=task, seed=seed, optimizer=optimizer, num_workers=options.workers)
        for task in options.tasks
        for seed in options.seeds
        for optimizer in ("zero_one_adam", "adamw")
        if "optimizers" in options.parts and not (optimizer == "adamw" and seed == options.seeds[0])
    ]


def plan_jobs(options: argparse.Namespace) -> list[Job]:
    """Return the jobs in order of priority: prepare, pretrain, train and score. The adapters, the main claim, come first."""
    data, base = options.output / "data", options.output / "base"
    text_tasks = list(dict.fromkeys([*options.tasks, *options.text]))
    prepare = [
        Job(
            name=f"prepare-{task}",
            command=(
                *("jobs/prepare.py", task, "--source", str(options.source / SOURCES.get(task, task))),
                *("--output", str(data)),
            ),
            is_done=_all_there(data / task / "train.parquet", data / task / "test.parquet"),
        )
        for task in text_tasks
    ]
    pretrain = Job(
        name="pretrain",
        command=(
            *("jobs/pretrain.py", "--tasks", ",".join(text_tasks), "--data", str(data), "--output", str(base)),
            *("--device", options.device, *PRETRAIN, *options.pretrain),
        ),
        needs=tuple(job.name for job in prepare),
        is_done=_all_there(base / "config.json"),
        driver_gpus=1.0 if options.device == "cuda" else 0.0,
    )
    bases = [
        _evaluation(options, Run(part="adapters", task=task, seed=0, bits=bits), f"{task}-base-{bits}bit", "pretrain")
        for task in options.tasks
        for bits in (16, 8, 4)
    ]
    adapters, optimizers = (
        [job for run in runs for job in _train_and_evaluate(options, run)]
        for runs in (plan_adapters(options), plan_optimizers(options))
    )
    return [*prepare, pretrain, *adapters, *bases, *optimizers]


def _train_and_evaluate(options: argparse.Namespace, run: Run) -> list[Job]:
    training = Job(
        name=f"train-{run.name}",
        command=("jobs/train.py", *_settings(options, run, run.name)),
        needs=("pretrain",),
        is_done=_has_result(options.output / run.part / run.name, "training"),
    )
    return [training, _evaluation(options, run, run.name, training.name)]


def _evaluation(options: argparse.Namespace, run: Run, name: str, needs: str) -> Job:
    extra = ("--base",) if needs == "pretrain" else ()
    return Job(
        name=f"evaluate-{name}",
        command=("jobs/evaluate.py", *extra, *_settings(options, run, name)),
        needs=(needs,),
        is_done=_has_result(options.output / run.part / name, "evaluation"),
    )


def _settings(options: argparse.Namespace, run: Run, name: str) -> list[str]:
    """Return a run's overrides, equal for training and evaluation."""
    schedule = SCHEDULES[run.task]
    batch = options.global_batch_size or schedule.global_batch_size
    limits = {"max_train_examples": options.max_train_examples, "max_test_examples": options.max_test_examples}
    share = options.optimizer_gpu_share if run.num_workers > 1 else options.gpu_share
    return [
        *(f"name={name}", f"output_dir={options.output / run.part}", f"seed={run.seed}"),
        *(f"model.base={options.output / 'base'}", f"model.bits={run.bits}", "model.max_seq_len=1024"),
        *(f"lora.rank={run.lora_rank}", f"data.dir={options.output / 'data'}", f"data.tasks=[{run.task}]"),
        *(f"data.{key}={value}" for key, value in limits.items() if value is not None),
        f"optim.name={run.optimizer}",
        f"optim.learning_rate={options.learning_rate or schedule.learning_rate}",
        f"train.epochs={options.epochs or schedule.epochs}",
        # One forward pass a step: several micro-batches would take several times as many launches.
        *(f"train.global_batch_size={batch}", f"train.micro_batch_size={batch // run.num_workers}"),
        *(f"train.num_workers={run.num_workers}", f"train.gpus_per_worker={share}", "train.max_failures=0"),
        *(f"train.device={options.device}", f"eval.device={options.device}", f"eval.num_gpus={options.gpu_share}"),
        *("eval.bits=null", "eval.batch_size=64"),
    ]


def _all_there(*files: Path) -> Callable[[], bool]:
    return lambda: all(file.is_file() for file in files)


def _has_result(folder: Path, kind: str) -> Callable[[], bool]:
    def is_done() -> bool:
        try:
            return any(result.kind == kind for result in read_results(folder / "results.jsonl"))
        except ResultError:
            return False

    return is_done


def run_jobs(options: argparse.Namespace, deadline: float) -> Outcome:
    """Submit everything from a copy of the code, so that all jobs run the same code despite edits."""
    from ray.job_submission import JobSubmissionClient

    for logger in ("ray", "ray.dashboard.modules.dashboard_sdk"):  # otherwise a line for each submission
        logging.getLogger(logger).setLevel(logging.WARNING)
    code = options.output / "code"
    if not code.exists():
        for folder in ("finlora", "jobs"):
            shutil.copytree(ROOT / folder, code / folder, ignore=shutil.ignore_patterns("__pycache__"))
    queue = JobQueue(JobSubmissionClient(options.address), code, options.output / "logs", options.jobs)
    return queue.run(plan_jobs(options), deadline)


def report(options: argparse.Namespace, outcome: Outcome) -> None:
    """Print tables and checks, and write them with `finlora report`'s plots to OUTPUT/report."""
    from rich.console import Console

    from finlora.report.write import render_report

    folder = options.output / "report"
    folder.mkdir(exist_ok=True)
    # Results of the two parts are separate, since `finlora report` keeps one result a variant, whatever its optimiser.
    parts = {part: _read(options.output / part) for part in ("adapters", "optimizers")}
    results = [result for own in parts.values() for result in own]
    texts = [compare_adapters(results, options.tasks), compare_optimizers(results, options.tasks), "## Checks\n"]
    texts += check_adapters(results, options.tasks) + check_optimizers(results, options.tasks)
    count = {name: len(getattr(outcome, name)) for name in ("kept", "finished", "failed", "not_run")}
    texts.append("\nJobs: " + ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in count.items()))
    print("\n" + "\n".join(texts), flush=True)
    (folder / "real_tasks.md").write_text("\n".join(texts) + "\n", encoding="utf-8")
    plot_optimizers(results, options.tasks, folder / "optimizers.png")
    if parts["adapters"]:
        with (folder / "report.log").open("w", encoding="utf-8") as stream:
            render_report(parts["adapters"], folder, Console(file=stream, width=140))


def _read(folder: Path) -> list[Result]:
    try:
        return read_results(folder)
    except ResultError:
        return []


def _keep_settings(options: argparse.Namespace) -> None:
    """Refuse an output folder with runs of other settings."""
    free = {
        "parts",
        "seeds",
        "output",
        "source",
        "address",
        "jobs",
        "limit_minutes",
        "gpu_share",
        "optimizer_gpu_share",
    }
    asked = json.dumps({key: value for key, value in vars(options).items() if key not in free}, indent=1)
    file = options.output / "settings.json"
    if file.is_file() and file.read_text(encoding="utf-8") != asked:
        raise SystemExit(f"{options.output} holds runs of other settings ({file}): choose another --output.")
    options.output.mkdir(parents=True, exist_ok=True)
    file.write_text(asked, encoding="utf-8")


def main() -> int:
    """Run the requested parts, and report what ended in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", type=Path, required=True, help="folder of raw folders: fpb, tfns and those of --text")
    add(
        "--output",
        type=Path,
        required=True,
        help="folder of data, base, runs, logs and report, on the cluster's storage",
    )
    add("--address", default="http://127.0.0.1:8265", help="the cluster's dashboard")
    add("--tasks", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    add("--text", nargs="*", choices=["headline", "fiqa", "ner"], default=[], help="further text to pretrain on")
    add("--parts", nargs="+", choices=["adapters", "optimizers"], default=["adapters", "optimizers"])
    add("--device", choices=["cuda", "cpu"], default="cuda")
    # Twelve drivers and their sixteen workers keep two GPUs busy, with a core for each process on 32 cores.
    add("--jobs", type=int, default=12, help="jobs submitted at a time; halve it for one GPU and 16 cores")
    add("--gpu-share", type=float, default=0.125, help="GPU a worker or evaluation; several runs share one")
    add("--optimizer-gpu-share", type=float, help="GPU a worker of two-worker runs; 1: over NCCL. Default: --gpu-share")
    add("--workers", type=int, default=2, help="data-parallel workers of 4-bit runs")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="the first is the adapters' seed")
    add("--epochs", type=int, help="of all tasks. Default: each task's own")
    add("--learning-rate", type=float, help="of all tasks. Default: each task's own")
    add("--global-batch-size", type=int, help="of all tasks. Default: each task's own")
    add("--max-train-examples", type=int, help="default: all")
    add("--max-test-examples", type=int, help="default: all")
    add(
        "--pretrain",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="pretraining settings that override this script's",
    )
    add("--limit-minutes", type=float, default=9.0, help="stop unfinished jobs after this time, and report the rest")
    options = parser.parse_args()
    started = time.monotonic()
    options.optimizer_gpu_share = options.optimizer_gpu_share or options.gpu_share
    options.output, options.source = options.output.expanduser().absolute(), options.source.expanduser().absolute()
    _keep_settings(options)
    outcome = run_jobs(options, started + 60 * options.limit_minutes - REPORT_SECONDS)
    report(options, outcome)
    print(f"Took {time.monotonic() - started:.0f} s; logs in {options.output / 'logs'}")
    return 1 if outcome.failed else 2 if outcome.not_run else 0


if __name__ == "__main__":
    sys.exit(main())
