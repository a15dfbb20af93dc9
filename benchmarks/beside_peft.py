"""FinLoRA and plain transformers + PEFT + bitsandbytes on the same adapters: accuracy, seconds and memory of both.

    python benchmarks/beside_peft.py --base BASE --data DATA --output OUT --tasks fpb --variants 4bit-r4      # alone: times
    python benchmarks/beside_peft.py --base BASE --data DATA --output OUT --at-once 12 --minutes 9            # resumes
    python benchmarks/beside_peft.py --base BASE --data DATA --output OUT --device cpu --tasks fiqa \\
        --set train.max_steps=8 data.max_train_examples=64 data.max_test_examples=24
    python benchmarks/beside_peft.py --output OUT --table

A row is a config jobs/configs/smollm2-135m-4bit-r4-TASK.yaml at a precision and a seed. Both sides train it and score its whole
test split, each by two commands: `finlora train` and `finlora evaluate`; plain_peft.py, which imports nothing of finlora. Equal
are the base's folder, settings, seed, token ids of prompts and answers, and order of the examples: FinLoRA's encoder writes them
for the plain side before its clock starts, so its times hold no tokenising. A plain pass holds as many padded examples as fit in
train.max_pack_tokens. Dropout samples other masks. One function judges the answers of both.

Times are taken from outside: start-up from the start of the training's process to the end of its first optimiser step, training
from there until the adapter's file is written, and both processes whole. With --at-once N, N processes run at a time, each with
an equal share of the GPUs, and the sides of a row start together; with 1 they run one after the other, without neighbours. Each
`finlora train` starts a Ray of its own, as on a new machine, unless RAY_ADDRESS or --shared-ray names one for all.

OUT/rows.jsonl gets a line a row. Finished rows are skipped; one that failed or was stopped runs again from its start. Exit
code 1: a side failed; 2: rows are left, since the time was over.
"""

from __future__ import annotations

import argparse
import math
import os
import queue
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from beside_inputs import Job, Row, make_job, read_finlora, read_plain
from beside_table import SIDES, has_failed, render_rows
from timed_command import GRACE_SECONDS, CommandError, StoppedByLimitError, run_command

from finlora.durable import append_line, read_lines
from finlora.errors import FinloraError
from finlora.reproduce.public_rows import FAMILY, TASKS, VARIANTS

ROOT = Path(__file__).resolve().parents[1]
PLAIN = Path(__file__).with_name("plain_peft.py")
FINLORA = (sys.executable, "-m", "finlora.cli.main")
_IDENTITY = ("task", "variant", "seed", "settings", "device")


def measure_side(side: str, job: Job, environment: dict[str, str], stop: threading.Event) -> dict[str, Any]:
    """Train and score a row on one side; returns its numbers, or its `error`.

    Raises:
        StoppedByLimitError: `stop` was set.
    """
    if side == "finlora":
        words = [[*FINLORA, verb, "--config", str(job.yaml), *job.overrides] for verb in ("train", "evaluate")]
        first_step, adapter, read = job.run.step, job.run.adapter, read_finlora
    else:
        words = [[sys.executable, str(PLAIN), verb, str(job.plain)] for verb in ("train", "evaluate")]
        first_step, adapter, read = job.plain / "first-step", job.plain / "adapter", read_plain
    train, evaluate = words
    try:
        trained = run_command(train, job.folder / f"{side}-train.log", ROOT, environment, stop, first_step)
        scored = run_command(evaluate, job.folder / f"{side}-evaluate.log", ROOT, environment, stop)
        if trained.first_step is None:
            raise CommandError(f"{first_step} was never filled: the training did no step")
        written = (adapter / "adapter_model.safetensors").stat().st_mtime
        return {
            "start_up_s": trained.first_step - trained.started,
            "training_s": written - trained.first_step,
            "train_wall_s": trained.wall,
            "evaluate_wall_s": scored.wall,
            "wall_s": trained.wall + scored.wall,
            **read(job),
        }
    except (CommandError, FinloraError, OSError) as error:
        return {"error": str(error)}


class Runner:
    """Slots: threads that run one row after the other.

    Args:
        environment: of the commands.
    """

    def __init__(self, options: argparse.Namespace, environment: dict[str, str]) -> None:
        self.options, self.environment = options, environment
        self.stop = threading.Event()
        self.num_left = self.num_failed = 0
        """Rows without a good record, and those of them that failed."""
        self._waiting: queue.SimpleQueue[Row] = queue.SimpleQueue()
        self._lock = threading.Lock()

    def run(self, rows: Sequence[Row], deadline: float) -> None:
        """Run rows until all have ended or the deadline (time.monotonic) is reached."""
        for row in rows:
            self._waiting.put(row)
        self.num_left = len(rows)
        slots = [threading.Thread(target=self._work, args=(slot,)) for slot in range(max(1, self.options.at_once // 2))]
        for thread in slots:
            thread.start()
        while any(thread.is_alive() for thread in slots):
            if time.monotonic() > deadline:
                self.stop.set()
            time.sleep(0.2)

    def _work(self, slot: int) -> None:
        while not self.stop.is_set():
            try:
                row = self._waiting.get_nowait()
            except queue.Empty:
                return
            try:
                record = self._measure(row, slot)
            except StoppedByLimitError:
                print(f"stopped  {row.name}", flush=True)
                return
            with self._lock:
                append_line(self.options.output / "rows.jsonl", record)
                self.num_left -= not has_failed(record)
                self.num_failed += has_failed(record)
                print(f"{'FAILED' if has_failed(record) else 'ended':8} {row.name}: {describe(record)}", flush=True)

    def _measure(self, row: Row, slot: int) -> dict[str, Any]:
        """Return a row's record.

        Raises:
            StoppedByLimitError: the time is over.
        """
        options, environment = self.options, dict(self.environment)
        folder = options.output / "work" / row.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yaml = ROOT / "jobs" / "configs" / f"{FAMILY}-{row.task}.yaml"
        try:
            job = make_job(row, options, yaml, folder, share_of_gpu(options.at_once, options.gpus))
        except FinloraError as error:
            return row.tree(options) | {side: {"error": str(error)} for side in SIDES}
        print(f"started  {row.name}", flush=True)
        if options.device == "cuda":
            environment["CUDA_VISIBLE_DEVICES"] = choose_gpu(slot, options.gpus)
        with ThreadPoolExecutor(1 if options.at_once == 1 else 2) as pool:
            running = [pool.submit(measure_side, side, job, environment, self.stop) for side in SIDES]
            sides = {side: each.result() for side, each in zip(SIDES, running, strict=True)}
        ray = "own" if environment.get("RAY_ADDRESS", "local") in ("", "local") else "shared"
        record = row.tree(options) | {"at_once": options.at_once, "ray": ray} | sides
        if not options.keep and not has_failed(record):
            shutil.rmtree(folder)
        return record


def share_of_gpu(at_once: int, num_gpus: int) -> float:
    """Return a process's share of a GPU, equal for all that run at once."""
    return math.floor(1e4 / -(-at_once // num_gpus)) / 1e4  # Ray counts GPUs in steps of 0.0001


def choose_gpu(slot: int, num_gpus: int) -> str:
    """Return the GPU of a slot, as CUDA_VISIBLE_DEVICES names it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))
    return visible.split(",")[slot % num_gpus]


def describe(record: dict[str, Any]) -> str:
    """Return both sides of a row in a line."""
    words = []
    for side in SIDES:
        own = record[side]
        if "error" in own:
            words.append(f"{side} {own['error']}")
        else:
            scores = ", ".join(f"{100 * score['accuracy']:.1f} %" for score in own["scores"].values())
            words.append(f"{side} {scores} in {own['wall_s']:.0f} s")
    return "; ".join(words)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the newest record of each row of a file."""
    return list({str([record[key] for key in _IDENTITY]): record for record in read_lines(path)}.values())


def list_missing(rows: Sequence[Row], records: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[Row]:
    """Return the rows without a record of both sides at these settings."""
    done = [{key: record[key] for key in _IDENTITY} for record in records if not has_failed(record)]
    return [row for row in rows if row.tree(options) not in done]


def make_environment(shared_ray: bool) -> dict[str, str]:
    """Return the environment of the commands.

    Args:
        shared_ray: start the Ray that all trainings of FinLoRA join.
    """
    # Also of this process: the workers of a shared Ray inherit it.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.environ.update({"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if not shared_ray:
        return dict(os.environ)
    from finlora.cluster import connect

    connect.connect(log_to_driver=False)
    import ray

    return {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def read_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    variants = [f"{bits}bit-r{rank}" for bits, rank in VARIANTS]
    add("--output", type=Path, required=True, help="folder of rows.jsonl, and of the running rows' files")
    add("--base", type=Path, help="folder of the base model, such as .demo/real-base")
    add("--data", type=Path, default=Path("~/finlora/data"), help="prepared tasks")
    add("--tasks", nargs="+", choices=TASKS, default=["fpb", "fiqa", "tfns", "ner", "headline", "xbrl"])
    add("--variants", nargs="+", choices=variants, default=variants)
    add("--seeds", nargs="+", type=int, default=[0])
    add("--device", choices=["cuda", "cpu"], default="cuda")
    add("--at-once", type=int, default=1, help="processes at a time: 1, or an even number, as the sides run in pairs")
    add("--gpus", type=int, default=1, help="GPUs, which the pairs take in turn")
    add("--shared-ray", action="store_true", help="start one Ray for all trainings, before the clock")
    add("--minutes", type=float, help="stop after this time; the same command goes on. Default: no limit")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", dest="settings", help="settings of both sides")
    add("--keep", action="store_true", help="keep the finished rows' adapters, logs and inputs")
    add("--table", action="store_true", help="print the table of the rows so far and run nothing")
    options = parser.parse_args()
    if options.at_once != 1 and (options.at_once < 1 or options.at_once % 2):
        parser.error(f"--at-once {options.at_once}: expected 1, or an even number, as the sides of a row run in pairs")
    if options.base is None and not options.table:
        parser.error("--base is missing: give the folder of the base model")
    options.output, options.data = (path.expanduser().absolute() for path in (options.output, options.data))
    options.base = options.base and options.base.expanduser().absolute()
    return options


def main() -> int:
    """Run the missing rows, and print the table of all rows of the output."""
    options, started = read_options(), time.monotonic()
    path = options.output / "rows.jsonl"
    if options.table:
        print(render_rows(read_rows(path)))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    rows = [
        Row(task=task, variant=variant, seed=seed)
        for seed in options.seeds
        for task in options.tasks
        for variant in options.variants
    ]
    runner = Runner(options, make_environment(options.shared_ray))
    before = {number: signal.signal(number, lambda *_: runner.stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    limit = math.inf if options.minutes is None else started + 60 * options.minutes - GRACE_SECONDS
    runner.run(list_missing(rows, read_rows(path), options), limit)
    for number, handler in before.items():
        signal.signal(number, handler)
    print(render_rows(read_rows(path)))
    print(
        f"Took {time.monotonic() - started:.0f} s. {runner.num_left} of {len(rows)} rows left, {runner.num_failed} failed."
    )
    return 1 if runner.num_failed else 2 if runner.num_left else 0


if __name__ == "__main__":
    sys.exit(main())
