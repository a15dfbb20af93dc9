"""Processes that write while they are killed, paused or out of disk; and a training loop that is interrupted at random times.

Each fault has its own child process, forked from one with all imports done. Its files are judged by reading them as the
product does: a complete version, or a refusal with an error of ours, never half a version. Then the same artefact is
written again, which must succeed and leave no scratch folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from finlora.errors import FinloraError
from finlora.train.run.run_folder import RunFolder, explain_full_disk
from tests.chaos.child import Child, mount
from tests.chaos.files import World, make_world, write_adapter, write_checkpoint
from tests.chaos.loop import break_loop
from tests.chaos.record import Injection, plain

_TASK = "synthetic_sentiment"


@dataclass(frozen=True)
class Writer:
    """Writer of one artefact: overwrites it with a version number as content, and reads the number back."""

    name: str
    write: Callable[[Path, int], None]
    read: Callable[[Path], int | None]
    """Returns the version number, None where no artefact exists. Raises FinloraError on a refusal."""


def list_faults(folder: Path) -> list[tuple[str, str, Callable[[int], Injection]]]:
    """Return kind, target and injecting function of each fault; the function takes the seed."""
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    world = make_world(folder / "world")
    faults: list[tuple[str, str, Callable[[int], Injection]]] = []
    for writer in _list_writers(world):
        home = folder / writer.name.replace(" ", "-").replace("'", "")
        for kind, act in (("killed while writing", _kill), ("disk full", _fill), ("held up while writing", _hold_up)):
            faults.append((kind, writer.name, partial(act, kind, writer, home)))
    for kind in ("killed", "out of memory", "held up", "clock set back or forward", "weight becomes NaN"):
        faults.append((kind, "training loop", partial(break_loop, kind, world)))
    return faults


def _list_writers(world: World) -> list[Writer]:
    def prepare(folder: Path, value: int) -> None:
        from finlora.data.example import Splits
        from finlora.data.sets.catalog import task_named
        from finlora.data.sets.prepare import code_version
        from finlora.data.sets.prepared import read_prepared, write_prepared

        split = read_prepared(world.folder / "data", _TASK, "train")
        parts = Splits(train=split.examples[value % 7 :], test=split.examples[:3], notes=(str(value),))
        write_prepared(
            task_named(_TASK),
            parts,
            folder,
            variant=str(value),
            source="",
            version=code_version(),
            overwrite=True,
            dry_run=False,
        )

    def read_set(folder: Path) -> int | None:
        from finlora.data.sets.prepared import read_prepared

        if not (folder / _TASK).exists():
            return None
        train, test = (read_prepared(folder, _TASK, split) for split in ("train", "test"))
        if train.notes != test.notes:
            raise ValueError(f"train of {train.notes}, test of {test.notes}")
        return int(train.notes[0])

    def adapter(folder: Path, value: int) -> None:
        write_adapter(dataclasses.replace(world, folder=folder), value)

    def read_adapter(folder: Path) -> int | None:
        from safetensors.torch import load_file

        from finlora.model.contract import CONTRACT_FILE, read_contract

        if not (folder / "adapter" / CONTRACT_FILE).exists():
            return None  # training is not finished: every reader checks for the contract
        contract = read_contract(folder / "adapter")
        contract.check_files(folder / "adapter")
        value = int(contract.metrics["loss_last"])
        if not all(
            (tensor == value).all() for tensor in load_file(folder / "adapter" / "adapter_model.safetensors").values()
        ):
            raise ValueError(f"contract of version {value}, weights of another version")
        return value

    def checkpoint(folder: Path, value: int) -> None:
        write_checkpoint(folder / f"checkpoint_{value:06}", value)

    def read_checkpoint(folder: Path) -> int | None:
        from finlora.train.run.checkpoint import read_info
        from finlora.train.run.snapshot import repair_snapshot

        repair_snapshot(folder)  # removes incomplete checkpoints, as each driver start does
        whole = sorted(folder.glob("checkpoint_[0-9]*"))
        return read_info(whole[-1], "0123456789abcdef", 2).step if whole else None

    def config(folder: Path, value: int) -> None:
        from finlora.configfile import save_config

        save_config(dataclasses.replace(world.config, seed=value), folder / "config.yaml")

    def read_config(folder: Path) -> int | None:
        from finlora.configfile import load_config

        return load_config(folder / "config.yaml").seed if (folder / "config.yaml").exists() else None

    def result(folder: Path, value: int) -> None:
        from finlora.results import Result, append_result

        note = {"note": {"x" * 20_000: value}}
        append_result(
            folder / "results.jsonl",
            Result(kind="evaluation", task="t", variant="base", base="b", bits=value, counts=note),
        )

    def read_results(folder: Path) -> int | None:
        from finlora.results import read_results

        if not (folder / "results.jsonl").exists():
            return None
        found = [each.bits for each in read_results(folder / "results.jsonl")]
        if found != list(range(found[0], found[0] + len(found))):
            raise ValueError(f"results {found} are not consecutive")
        return found[-1]

    return [
        Writer("prepared set", prepare, read_set),
        Writer("adapter", adapter, read_adapter),
        Writer("checkpoint", checkpoint, read_checkpoint),
        Writer("config", config, read_config),
        Writer("results", result, read_results),
    ]


def _kill(kind: str, writer: Writer, home: Path, seed: int) -> Injection:
    """SIGKILL to a child that writes version after version."""
    return _disturb(kind, writer, home, seed, lambda rng, child: (time.sleep(rng.uniform(0, 0.25)), child.kill()))


def _hold_up(kind: str, writer: Writer, home: Path, seed: int) -> Injection:
    """A child paused by SIGSTOP in the middle of its writes, as on a slow disk, while this process reads; then resumed."""

    def hold(rng: random.Random, child: Child) -> None:
        for _ in range(4):
            time.sleep(rng.uniform(0, 0.04))
            child.signal(signal.SIGSTOP)
            with contextlib.suppress(FinloraError):  # a refusal is correct for now
                if (
                    writer.name != "checkpoint"
                ):  # reading repairs the folder, which a driver does only without a live writer
                    _read(writer, home)
            child.signal(signal.SIGCONT)
        child.kill()

    return _disturb(kind, writer, home, seed, hold)


def _disturb(
    kind: str, writer: Writer, home: Path, seed: int, act: Callable[[random.Random, Child], object]
) -> Injection:
    home.mkdir(exist_ok=True)
    rng, lost = random.Random(seed), ""
    try:
        first = (_read(writer, home) or 0) + 1
    except Exception as error:
        return Injection(kind, writer.name, seed, "", f"not readable before the fault: {error}")

    def work() -> None:
        writer.write(home, first)
        child_is_ready.write_text("")
        for value in range(first + 1, first + 1000):
            writer.write(home, value)

    child_is_ready = home.with_suffix(".ready")
    child_is_ready.unlink(missing_ok=True)
    child = Child(work)
    while not child_is_ready.exists():
        if child.is_over:
            return Injection(kind, writer.name, seed, "", f"the writer exited by itself: {child.words}")
        time.sleep(0.001)
    started = time.monotonic()
    try:
        act(rng, child)
    except Exception as error:
        lost = f"a reader saw half a version: {error}"
        child.kill()
    if child.words:
        lost = lost or f"the writer failed: {child.words}"
    seen, judged = _judge(writer, home, first)
    lost = lost or judged
    recovery = time.monotonic() - started
    return Injection(kind, writer.name, seed, seen, lost or _write_again(writer, home), recovery)


def _read(writer: Writer, home: Path) -> int | None:
    return writer.read(home)


def _judge(writer: Writer, home: Path, at_least: int) -> tuple[str, str]:
    """Return what a reader sees now, and what is lost."""
    try:
        value = _read(writer, home)
    except FinloraError as error:
        return f"{type(error).__name__}: {plain(str(error), home)}", ""
    except Exception as error:
        return "", f"{type(error).__name__}: {error}"
    if value is None:
        return "no version exists, the work is repeated", ""
    return "a complete version", "" if value >= at_least else f"version {value} after {at_least}"


def _write_again(writer: Writer, home: Path) -> str:
    """Write the artefact again, as the user would; returns what went wrong."""
    value = 10**5
    with contextlib.suppress(FinloraError):
        value = (_read(writer, home) or 0) + 1
    for path in home.rglob(".*-*"):
        os.utime(path, (time.time() - 3600, time.time() - 3600))  # scratch is swept when it is older than a minute
    try:
        writer.write(home, value)
        found = _read(writer, home)
    except FinloraError as error:
        if writer.name != "results":
            return f"cannot be rewritten: {error}"
        (home / "results.jsonl").unlink()  # its message asks for a line to be removed
        return ""
    left = [path.name for path in home.rglob(".*") if path.is_dir()]
    return f"left behind: {left}" if left else "" if found == value else f"wrote {value}, read {found}"


def _fill(kind: str, writer: Writer, home: Path, seed: int) -> Injection:
    """A full disk: a private tmpfs with random free space for the second version; then the space is freed."""
    home.mkdir(exist_ok=True)
    report = home.with_suffix(".report")
    report.unlink(missing_ok=True)
    child = Child(lambda: report.write_text(json.dumps(_fill_in_child(writer, home / "disk", random.Random(seed)))))
    child.wait()
    if not report.exists():
        return Injection(kind, writer.name, seed, "", f"the writer crashed: {child.words}")
    return Injection(kind, writer.name, seed, *json.loads(report.read_text()))


def _fill_in_child(writer: Writer, disk: Path, rng: random.Random) -> tuple[str, str]:
    disk.mkdir(exist_ok=True)
    is_mounted = mount(disk)
    writer.write(disk, 1)
    # Size of the first version, and so the space that the second needs beside it.
    size = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file())
    if is_mounted:
        room = rng.randrange(0, size + 4096) // 4096 * 4096
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        with (disk / "filler").open("wb") as stream:
            stream.write(b"x" * max(0, free - room))
    else:
        largest = max(path.stat().st_size for path in disk.rglob("*") if path.is_file())
        resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(largest), resource.RLIM_INFINITY))
    seen = "the space was enough"
    try:
        writer.write(disk, 2)
    except Exception as error:
        said = error if isinstance(error, FinloraError) else explain_full_disk(error, RunFolder(disk))
        if said is None:
            return "", f"{type(error).__name__} does not name the disk: {error}"
        seen = f"{type(said).__name__}: {plain(str(said), disk)}"
    (disk / "filler").unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _, lost = _judge(writer, disk, 1)
    return seen, lost or _write_again(writer, disk)
