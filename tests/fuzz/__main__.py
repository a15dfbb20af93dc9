"""Fuzzing of every input from outside: mutated inputs, on which FinLoRA may raise its own errors only.

    make fuzz                                                    # every target of targets.py, 20 minutes in total
    make fuzz MINUTES=5
    python -m tests.fuzz --targets arrow parquet --minutes 20 --seed 7
    python -m tests.fuzz --targets arrow --replay fuzz-found/arrow-1f2e3d4c

--minutes limits the whole run and is shared by the targets, start-up included. Ctrl-C, SIGTERM and SIGHUP kill the
running target and print a summary. Each target runs in its own process, with limits of memory and of seconds for each
input. Inputs are mutated by coverage of FinLoRA's code where `atheris` is installed (`pip install atheris`, not a
dependency), else at random, which finds less. The random seed is printed first: the same seed with an empty --found
repeats the inputs. A failing input is saved in --found, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

import psutil

from tests.chaos.time_budget import StoppedError, note_signals, run_part

_SLOW_S = 20.0
_LEAST_S = 15.0
"""Minimum for a target: imports and valid inputs take part of it on a busy machine."""
_END_S = 5.0
"""A target stops this long before its share is over; one that does not is busy with an input."""
_TOKENS = (
    b"",
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b'"',
    b"9" * 400,
    b"\n",
    b"&a *a",
    b"\xed\xa0\x80",
    b"\\ud800",
    b"../",
    b"NaN",
    b"-1",
    b"1e999",
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", metavar="TARGET", help="default: all")
    parser.add_argument("--minutes", type=float, default=20.0, help="limit of all targets together, start-up included")
    parser.add_argument(
        "--inputs", type=int, metavar="N", help="most inputs of a target; default: until its time is over"
    )
    parser.add_argument("--seed", type=int, help="default: random, and printed")
    parser.add_argument("--engine", choices=["atheris", "random"], help="default: atheris where it is installed")
    parser.add_argument("--memory-mib", type=int, default=4096, help="memory limit of a target's process")
    parser.add_argument("--found", type=Path, default=Path("fuzz-found"), help="folder of failing inputs")
    parser.add_argument("--replay", type=Path, help="run one target on this input alone, and show what it raises")
    parser.add_argument("--run-one", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    from tests.fuzz.targets import TARGETS

    unknown = set(options.targets or ()) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target {min(unknown)}: expected some of {', '.join(TARGETS)}")
    if options.replay:
        if len(options.targets or ()) != 1:
            parser.error("--replay needs exactly one of --targets")
        from tests.fuzz.targets import run_one

        run_one(TARGETS[options.targets[0]], options.replay.read_bytes())
        print("no error, or one of FinLoRA's own")
        return 0
    engine = options.engine or ("atheris" if importlib.util.find_spec("atheris") else "random")
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**31)
    if options.run_one:
        return _run_here(options.run_one, engine, seed, options)
    options.found.mkdir(parents=True, exist_ok=True)
    return _run_all(list(options.targets or TARGETS), engine, seed, options)


def _run_all(names: list[str], engine: str, seed: int, options: argparse.Namespace) -> int:
    started = time.monotonic()
    until, code, number = started + options.minutes * 60, 0, 0
    names, left = names[: (fitting := max(1, int(options.minutes * 60 / _LEAST_S)))], names[fitting:]
    try:
        with note_signals() as asked:
            print(
                f"seed {seed}, inputs by {engine}, {len(names)} targets in at most {options.minutes:g} minutes in total: "
                f"{options.minutes * 60 / len(names):.0f} s each, start-up included",
                flush=True,
            )
            if left:
                print(f"skipped, since a target needs at least {_LEAST_S:.0f} s: {', '.join(left)}", flush=True)
            for number, name in enumerate(names):
                share = (until - time.monotonic()) / (len(names) - number)
                code = max(code, _run_apart(name, engine, seed, share, asked, options))
            number = len(names)
    except StoppedError as stop:
        print(f"{stop}: the running target was killed", flush=True)
        code = stop.exit_code
    print(f"{number} of {len(names)} targets in {time.monotonic() - started:.0f} s", flush=True)
    return code


def _run_apart(name: str, engine: str, seed: int, share: float, asked: list[int], options: argparse.Namespace) -> int:
    """Run a target in a process and print its result; returns 1 on a failing input.

    Args:
        share: time limit in seconds, start-up included.
        asked: received signals (`note_signals`).
    """
    seconds = max(share - _END_S, share / 2)
    settings = ["--seconds", str(seconds), "--seed", str(seed), "--memory-mib", str(options.memory_mib)]
    if options.inputs is not None:
        settings += ["--inputs", str(options.inputs)]
    start = [sys.executable, "-m", "tests.fuzz", "--run-one", name, "--engine", engine]
    command = [*start, *settings, "--found", str(options.found)]
    started = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as folder,
        (Path(folder) / "log").open("w+", errors="replace") as log,
    ):
        code = run_part(command, share, asked, stdout=log, stderr=log, env={**os.environ, "TMPDIR": folder})
        log.seek(0)
        said = log.read()
    counts = re.findall(r"(?:stat::number_of_executed_units:\s*|executed |^#)(\d+)", said, flags=re.MULTILINE)
    number = f"{int(counts[-1]):,}" if counts else "an unknown number of"
    verdicts = {0: "no failures", None: "FAILED: killed at its time limit, busy with an input or its start-up"}
    print(
        f"{name:16} {number:>20} inputs {time.monotonic() - started:6.0f} s  {verdicts.get(code, f'FAILED (exit {code})')}",
        flush=True,
    )
    if code != 0:
        print("\n".join(said.splitlines()[-60:]), flush=True)
    return int(code != 0)


def _run_here(name: str, engine: str, seed: int, options: argparse.Namespace) -> int:
    if engine == "atheris":
        _run_atheris(name, seed, options)
        return 0  # atheris exits the process itself
    from tests.fuzz.targets import TARGETS, run_one

    target, rng = TARGETS[name], random.Random(f"{seed} {name}")
    seeds = target.seeds()
    for data in seeds:  # all imports happen before the memory limit applies
        run_one(target, data)
    limit = options.memory_mib * 2**20
    until, number = psutil.Process().create_time() + options.seconds, 0
    signal.signal(signal.SIGALRM, _give_up)
    while time.time() < until and number != options.inputs:
        signal.alarm(round(_SLOW_S))
        data, started = _mutate(rng, seeds), time.monotonic()
        try:
            run_one(target, data)
            _require_bounds(started, limit)
        except Exception:
            path = options.found / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}"
            path.write_bytes(data)
            traceback.print_exc()
            print(f"saved as {path}; executed {number}")
            return 1
        number += 1
    print(f"executed {number}")
    return 0


def _give_up(_number: int, _frame: object) -> None:
    raise RuntimeError(f"the input took longer than {_SLOW_S:.0f} s")


def _require_bounds(started: float, limit: int) -> None:
    seconds, peak = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if seconds > _SLOW_S:
        raise RuntimeError(f"the input took {seconds:.1f} s")
    if peak > limit:
        raise RuntimeError(f"the input took {peak / 2**20:.0f} MiB")


def _mutate(rng: random.Random, seeds: list[bytes]) -> bytes:
    """Cut, repeat, flip and overwrite parts of a valid input, a few times."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([1, 1, 2, 3, 8])):
        start = rng.randrange(len(data) + 1)
        stop = min(len(data), start + rng.choice([0, 1, 1, 2, 4, 8, 64]))
        part = rng.choice([*_TOKENS, rng.randbytes(rng.choice([1, 2, 4, 8])), bytes(data[start:stop]) * 2])
        if rng.random() < 0.3 and stop > start:
            data[start] ^= 1 << rng.randrange(8)
        else:
            data[start:stop] = part * (5000 if rng.random() < 0.02 else 1)
    return bytes(data)


def _run_atheris(name: str, seed: int, options: argparse.Namespace) -> None:
    import atheris

    corpus = options.found / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    with atheris.instrument_imports(include=["finlora", "yaml"]):
        from tests.fuzz.targets import TARGETS, run_one

        for data in TARGETS[name].seeds():
            (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            run_one(TARGETS[name], data)  # imports all it needs
    until = psutil.Process().create_time() + options.seconds
    settings = [
        f"-max_total_time={max(1, round(until - time.time()))}",
        f"-seed={seed or 1}",
        f"-rss_limit_mb={options.memory_mib}",
        f"-timeout={_SLOW_S:g}",
        f"-artifact_prefix={options.found}/{name}-",
        "-max_len=16384",
        "-print_final_stats=1",
        f"-runs={-1 if options.inputs is None else options.inputs}",
    ]
    atheris.Setup([sys.argv[0], *settings, str(corpus)], lambda data: run_one(TARGETS[name], data))
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
