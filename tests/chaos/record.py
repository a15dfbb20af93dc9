"""Records of fault injection: each fault, what the user saw, what was lost and what stayed behind."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil


@dataclasses.dataclass(frozen=True, slots=True)
class Injection:
    """One fault."""

    kind: str
    """`bit flipped`, `killed`, ..."""
    target: str
    """The damaged artefact or the killed process."""
    seed: int
    """`--only KIND/TARGET --only-seed SEED` repeats the fault (files and writers)."""
    seen: str
    """What the user sees, without numbers and paths."""
    lost: str = ""
    """What was lost or wrong; empty where nothing was."""
    recovery_s: float | None = None
    """Seconds until the work continued; None where it was not interrupted."""


class Tally:
    """Faults of a part: each is printed and appended to a JSON lines file at once."""

    def __init__(self, record: Path | None, until: float) -> None:
        self.injections: list[Injection] = []
        self._record = record
        self._until = until

    @property
    def is_over(self) -> bool:
        """Whether the time of the part is over."""
        return time.monotonic() >= self._until

    def add(self, injection: Injection) -> None:
        self.injections.append(injection)
        recovery = "" if injection.recovery_s is None else f", recovered after {injection.recovery_s:.1f} s"
        lost = f"  LOST: {injection.lost}" if injection.lost else ""
        say(f"seed {injection.seed:>10}  {injection.kind}, {injection.target}: {injection.seen}{recovery}{lost}")
        if self._record is not None:
            with self._record.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(dataclasses.asdict(injection)) + "\n")


def read_injections(path: Path) -> list[Injection]:
    whole, _, _ = path.read_text(encoding="utf-8").rpartition(
        "\n"
    )  # a part may be killed while it writes its last line
    return [Injection(**json.loads(line)) for line in whole.splitlines()]


def render_table(injections: Sequence[Injection]) -> str:
    """Return a Markdown table with a row for each kind and target."""
    rows = [
        "| fault | target | count | what the user sees | lost | recovery, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    groups: dict[tuple[str, str], list[Injection]] = {}
    for each in injections:
        groups.setdefault((each.kind, each.target), []).append(each)
    for (kind, target), members in groups.items():
        seen = Counter(each.seen for each in members)
        words = "; ".join(f"{text} ({count})" if len(seen) > 1 else text for text, count in seen.most_common(3))
        times = sorted(each.recovery_s for each in members if each.recovery_s is not None)
        recovery = f"{times[len(times) // 2]:.1f} (at most {times[-1]:.1f})" if times else ""
        lost = sum(bool(each.lost) for each in members)
        rows.append(f"| {kind} | {target} | {len(members)} | {words} | {lost} | {recovery} |")
    return "\n".join(rows) + "\n"


def plain(text: str, folder: Path | None = None) -> str:
    """Return a message without the parts that vary: folders, numbers and hashes."""
    if folder is not None:
        text = text.replace(str(folder), "...")
    text = re.sub(r"/[\w./-]+", lambda match: Path(match[0]).name, " ".join(text.split()))
    text = re.sub(r"\b[0-9a-f]{8,}\b|\d+", "N", text).partition(" (")[0]
    return text[:90].rpartition(" ")[0].replace("|", "/") if len(text) > 90 else text.replace("|", "/")


def seeds(seed: int, kind: str, target: str, only_seed: int | None = None) -> Iterator[int]:
    """Yield the seeds of one kind of fault. They depend on the arguments alone, so that a fault can be repeated."""
    if only_seed is not None:
        yield only_seed
        return
    source = random.Random(f"{seed} {kind} {target}")
    while True:
        yield source.randrange(2**32)


def leftovers(*, of: Sequence[psutil.Process], folder: Path) -> list[str]:
    """Return leftovers of ended processes: live processes, listening ports, shared memory and scratch folders.

    Args:
        of: every process ever seen below the started commands.
        folder: their TMPDIR.
    """
    _, alive = psutil.wait_procs(list(of), timeout=20)
    left = [f"process {' '.join(process.cmdline())[:80]}" for process in alive if process.is_running()]
    for process in alive:
        left += [f"port {line.laddr.port}" for line in process.net_connections() if line.status == psutil.CONN_LISTEN]
        process.kill()
    pids = {process.pid for process in of}
    for path in Path("/dev/shm").iterdir():
        owner = re.search(r"(?:hdr|obj|torch_)(\d+)[-_]", path.name)
        if owner and int(owner[1]) in pids:
            left.append(f"shared memory {path.name[:7]}...")
    left += [f"scratch {path.name.rpartition('-')[0]}" for path in folder.glob("**/finlora-*") if path.is_dir()]
    return left


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
