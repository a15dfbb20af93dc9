"""Acceptance walk: every verb as a user types it, on a small real base; checks numbers, not only exit codes.

    make accept                                   # downloads the base; uses a GPU if there is one
    make accept DEVICE=cpu ONLY=train-main,ask    # some steps, and the steps that they need
    python3 -m tests.acceptance --base FOLDER --output DIR [--device cuda] [--data RAW] [--only STEP,...]

RAW holds the folders `fpb` and `xbrl` with the published raw files; without it only generated sets are used. DIR gets
acceptance.md, acceptance.jsonl, every command's output in logs/, and the runs. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

from acceptance.checks import Checks, Row, StepError
from acceptance.processes import end_marked, marked_processes
from acceptance.schedule import Step, choose_steps, run_steps
from acceptance.steps import STEPS
from acceptance.table import describe_row, summarise, write_table
from acceptance.verbs.cluster import SharedCluster
from acceptance.verbs.scale import ON_CPU, ON_GPU
from acceptance.walk import Tools, Walk

_LEFT_S = 20.0


def read_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m tests.acceptance"
    )
    add = parser.add_argument
    add("--base", type=Path, required=True, help="folder of SmolLM2-135M-Instruct (jobs/bases/real_base.py makes it)")
    add("--output", type=Path, required=True, help="folder of the table, logs and runs; must be new without --resume")
    add(
        "--resume",
        action="store_true",
        help="keep results of successful steps in --output; steps of --only run again",
    )
    add("--device", choices=["cuda", "cpu"], help="default: cuda if torch sees a GPU")
    add("--data", type=Path, help="folder with raw `fpb` and `xbrl`; without it: generated sets")
    add(
        "--only",
        default="",
        help=f"comma-separated steps, with those that they need: {', '.join(step.name for step in STEPS)}",
    )
    add("--jobs", type=int, help="steps at once; default: 1 on a CPU, up to 8 on a GPU")
    add(
        "--minutes",
        type=float,
        help="limit of the walk; default: 10 on a GPU, 60 on a CPU, times --patience",
    )
    add("--patience", type=float, default=1.0, help="factor on all time limits, for a busy machine")
    options = parser.parse_args(words)
    for name in ("base", "output", "data"):
        path = getattr(options, name)
        setattr(options, name, path.expanduser().absolute() if path else None)
    if not (options.base / "config.json").is_file():
        parser.error(f"--base {options.base} holds no config.json: make it with jobs/bases/real_base.py")
    if options.data and not (options.data / "fpb").is_dir():
        parser.error(f"--data {options.data} holds no folder fpb with the raw files of Financial PhraseBank")
    if (options.output / "accept.yaml").exists() and not options.resume:
        parser.error(
            f"--output {options.output} holds a walk already: remove it, choose another folder, or --resume it"
        )
    options.only = [name for name in options.only.split(",") if name]
    try:
        options.steps = choose_steps(STEPS, options.only)
    except ValueError as error:
        parser.error(str(error))
    return options


def choose_device(asked: str | None) -> tuple[str, int]:
    """Return the device, `cuda` by default if there is a GPU, and the number of GPUs that torch sees."""
    import torch

    count = torch.cuda.device_count()
    return asked or ("cuda" if count else "cpu"), count


def main(words: list[str] | None = None) -> int:
    """Run the walk, and always write the table."""
    options = read_arguments(words)
    device, num_gpus = choose_device(options.device)
    scale = ON_GPU if device == "cuda" else ON_CPU
    started = time.monotonic()
    walk = Walk(options.base, options.data, options.output, device, num_gpus, scale, options.patience)
    at_once = options.jobs or max(1, min(scale.steps_at_once, (os.cpu_count() or 1) // 2))
    title = f"{device}, {num_gpus} GPUs, {os.cpu_count()} cores, {at_once} steps at once, {walk.task}"
    _say(f"Acceptance on {title}. Logs: {walk.logs}")
    rows: list[Row] = []
    seconds: dict[str, float] = {}
    stop, lock = threading.Event(), threading.Lock()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _stop(stop, walk))
    minutes = options.minutes or scale.minutes * options.patience
    limit = threading.Timer(60 * minutes, _stop, (stop, walk))
    limit.daemon = True
    limit.start()

    def keep(row: Row) -> None:
        with lock:
            rows.append(row)
            _say(describe_row(row))

    def is_kept(step: Step) -> bool:
        return options.resume and step.name not in options.only and (walk.output / "ended" / step.name).exists()

    def run(step: Step) -> bool:
        ended = walk.output / "ended" / step.name
        if is_kept(step):
            return True
        tools, begun = Tools(walk, Checks(step.name, keep)), time.monotonic()
        ended.unlink(missing_ok=True)
        walk.forget(step.makes)
        try:
            step.run(tools)
            if all(row.state != "failed" for row in tools.checks.rows):
                ended.touch()
            return True
        except StepError:
            return False
        except Exception as error:  # an exception in a step is a failed check, and the walk continues
            tools.checks.fail("the step itself", "no exception", f"{type(error).__name__}: {error}")
            return False
        finally:
            tools.close()
            seconds[step.name] = time.monotonic() - begun

    def skip(step: Step, why: str) -> None:
        Checks(step.name, keep).skip("all", why)

    cluster = SharedCluster(walk)
    try:
        if any(step.needs_ray and not is_kept(step) for step in options.steps):
            cluster.start()
        run_steps(options.steps, run, skip, at_once, stop)
        if not options.only and not stop.is_set():
            _check_verbs(walk, Checks("verbs", keep))
    finally:
        limit.cancel()
        cluster.close()
        Checks("end", keep).at_most("minutes in all", minutes, (time.monotonic() - started) / 60)
        _check_left(walk, Checks("end", keep))
        walk.close()
        write_table(walk.output, rows, seconds, title, time.monotonic() - started)
    _say(f"{summarise(rows, time.monotonic() - started)} Table: {walk.output / 'acceptance.md'}")
    return 1 if any(row.state == "failed" for row in rows) else 130 if stop.is_set() else 0


def _stop(stop: threading.Event, walk: Walk) -> None:
    """Kill all commands at a signal or at the time limit; running steps fail, and the table is written."""
    stop.set()
    end_marked(walk.mark)


def _check_verbs(walk: Walk, checks: Checks) -> None:
    from finlora.cli.app import ORDER

    checks.equal("verbs of `finlora --help` that no step typed", [], sorted(set(ORDER) - walk.verbs))


def _check_left(walk: Walk, checks: Checks) -> None:
    """Find processes that outlived their commands, wait for them to end, and kill the rest."""
    until = time.monotonic() + _LEFT_S
    while marked_processes(walk.mark) and time.monotonic() < until:
        time.sleep(0.5)
    left = end_marked(walk.mark)
    checks.equal("processes left behind", [], sorted(title[:80] for title in left.values()))


def _say(line: str) -> None:
    sys.stdout.write(line.replace("\n", " ")[:600] + "\n")
    sys.stdout.flush()
