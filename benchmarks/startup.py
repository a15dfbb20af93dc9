"""Start of `finlora train`, `evaluate` and `ask` as a user types them: wall and CPU seconds, cold and warm, in one run.

    python benchmarks/startup.py --base .demo/real-base --data ~/finlora/data                    # on a GPU
    python benchmarks/startup.py --base .demo/real-base --data ~/finlora/data --device cpu
    python benchmarks/startup.py ... --checkouts . /tmp/before                                   # beside another version

Cold: no kernel is compiled yet, and the files of the packages, of this project and of the base are dropped from the page cache as
far as no other process has them open. Warm: the same command again. CPU seconds are summed over all processes that the command
starts, read ten times a second.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

VERBS = ("train", "evaluate", "ask")
QUESTION = "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn"
MARK = "FINLORA_STARTUP_BENCHMARK"
"""Variable by which the processes of a command are found."""
POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Start:
    """One command."""

    checkout: str
    verb: str
    is_cold: bool
    seconds: float
    """Until the command ended."""
    first_step_s: float | None
    """Training: until its first step was done."""
    cpu_seconds: float
    started: str
    """The command's own line on its start; empty where it shows none."""
    exit_code: int


def list_commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Return the arguments of each verb, which train, score and ask one adapter.

    Args:
        folder: of the run's output.
    """
    own = [
        *(f"model.base={options.base}", f"data.dir={options.data}", f"data.tasks=[{options.task}]"),
        *(f"output_dir={folder}", "name=startup", f"model.bits={options.bits}", f"eval.bits={options.eval_bits}"),
        *(f"train.device={options.device}", f"eval.device={options.device}", "train.num_workers=1"),
        *(f"train.max_steps={options.steps}", "train.log_every_steps=1", f"data.max_test_examples={options.examples}"),
        *("model.template=chat", "model.max_seq_len=2048", "tracking.tensorboard=false"),
    ]
    return {
        "train": ["train", *own],
        "evaluate": ["evaluate", *own],
        "ask": ["ask", QUESTION, "--task", options.task, *own],
    }


def run(checkout: Path, verb: str, arguments: Sequence[str], folder: Path, kernels: Path, *, is_cold: bool) -> Start:
    """Run a command and measure it.

    Args:
        checkout: folder of the version of this project.
        folder: of the run's output.
        kernels: folder of compiled kernels.
    """
    mark = uuid.uuid4().hex
    path = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        MARK: mark,
        "TRITON_CACHE_DIR": str(kernels / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(kernels / "inductor"),
    }
    step = folder / "startup" / "step"
    first_step, started, cpu = None, time.monotonic(), dict[int, float]()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        command = [sys.executable, "-m", "finlora.cli.main", *arguments]
        process = subprocess.Popen(command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        while True:
            is_ended = process.poll() is not None
            cpu |= read_cpu(mark)
            if first_step is None and verb == "train" and step.is_file() and step.stat().st_size:
                first_step = time.monotonic() - started
            if is_ended:
                break
            time.sleep(POLL_S)
        seconds = time.monotonic() - started
        output.seek(0)
        lines = output.read().splitlines()
    if process.returncode:
        print("\n".join(lines[-15:]), file=sys.stderr)
    return Start(
        checkout=str(checkout),
        verb=verb,
        is_cold=is_cold,
        seconds=seconds,
        first_step_s=first_step,
        cpu_seconds=sum(cpu.values()),
        started=next((line for line in lines if line.startswith("Started in ")), ""),
        exit_code=process.returncode,
    )


def read_cpu(mark: str) -> dict[int, float]:
    """Return the CPU seconds of each process that has the mark in its environment."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                fields = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):  # it has just ended, or belongs to another account
            continue
    return found


def list_files(folders: Iterable[Path]) -> Iterator[Path]:
    """Yield the files below folders."""
    for folder in folders:
        yield from (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def drop_from_cache(files: Iterable[Path]) -> int:
    """Ask the system to drop files from the page cache; returns how many could be asked for. Needs no special rights."""
    count = 0
    for path in files:
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            os.fsync(descriptor)  # unwritten pages stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            count += 1
        except OSError:
            pass
        finally:
            os.close(descriptor)
    return count


def list_packages(checkout: Path) -> list[Path]:
    """Return the folders of this interpreter's packages, and of a version of this project."""
    found = {
        Path(entry) for entry in sys.path if entry and Path(entry).name in ("site-packages", "dist-packages", "site")
    }
    found |= {Path(entry) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry}
    return [*(folder for folder in found if folder.is_dir()), checkout / "finlora"]


def make_table(starts: Sequence[Start]) -> str:
    """Return a Markdown table, a row for each version and verb."""
    lines = [
        "| version | verb | cold s | warm s | cold, first step | warm, first step | cold CPU s | warm CPU s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows: dict[tuple[str, str], dict[bool, Start]] = {}
    for start in starts:
        rows.setdefault((start.checkout, start.verb), {})[start.is_cold] = start
    for (checkout, verb), pair in rows.items():
        cells = [_cell(pair, is_cold, name) for name in _COLUMNS for is_cold in (True, False)]
        lines.append(f"| {checkout} | {verb} | {' | '.join(cells)} |")
    return "\n".join(lines)


_COLUMNS = ("seconds", "first_step_s", "cpu_seconds")


def _cell(pair: Mapping[bool, Start], is_cold: bool, name: str) -> str:
    start = pair.get(is_cold)
    if start is None:
        return ""
    if start.exit_code:
        return f"exit {start.exit_code}"
    value = getattr(start, name)
    return "" if value is None else f"{value:.1f}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure each version, verb by verb, cold and then warm, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("~/finlora/data").expanduser(), help="prepared tasks")
    parser.add_argument("--task", default="fiqa")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--eval-bits", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--examples", type=int, default=64, help="test examples that are scored")
    parser.add_argument("--verbs", nargs="+", choices=VERBS, default=list(VERBS), help="evaluate and ask need train")
    parser.add_argument("--checkouts", nargs="+", type=Path, default=[Path(__file__).resolve().parents[1]])
    parser.add_argument("--warm-only", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON lines file to append to")
    options = parser.parse_args(arguments)
    options.base, options.data = options.base.expanduser().resolve(), options.data.expanduser().resolve()
    starts = []
    for checkout in (path.resolve() for path in options.checkouts):
        with tempfile.TemporaryDirectory(prefix="finlora-startup-") as scratch:
            for verb in options.verbs:
                for is_cold in (True, False):
                    if is_cold and options.warm_only and verb != "train":
                        continue
                    # Training again would find the finished run: each has a folder of its own, the last is scored.
                    folder = Path(scratch) / ("cold" if is_cold and verb == "train" else "warm")
                    folder.mkdir(exist_ok=True)
                    kernels = Path(scratch) / f"kernels-{verb}"
                    if is_cold and not options.warm_only:
                        drop_from_cache(list_files([*list_packages(checkout), options.base, options.data]))
                    command = list_commands(options, folder)[verb]
                    start = run(checkout, verb, command, folder, kernels, is_cold=is_cold)
                    print(f"{verb} {'cold' if is_cold else 'warm'}: {start.seconds:.1f} s. {start.started}", flush=True)
                    starts.append(start)
                    if options.output:
                        with options.output.open("a", encoding="utf-8") as stream:
                            stream.write(json.dumps(asdict(start)) + "\n")
    print(make_table(starts))


if __name__ == "__main__":
    main()
