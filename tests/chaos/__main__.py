"""Fault injection, each fault with its seed: damages files and kills processes at random times, then checks that nothing is lost.

    make chaos                                                   # all parts, at most 50 minutes
    make chaos MINUTES=5                                         # the parts that fit into 5 minutes
    python -m tests.chaos --parts files writers --seed 7         # without Ray, about two minutes
    python -m tests.chaos --parts train serve --minutes 15
    python -m tests.chaos --parts files --only "bit flipped/checkpoint" --only-seed 123456  # repeats one fault

`files` damages files on disk. `writers` kills or pauses processes that write, fills their disk, and breaks a training
loop in its own process. `train` kills processes of `finlora train` and `finlora tune` on Ray nodes of this machine.
`serve` kills processes of `finlora serve` under load. Each fault prints its seed; offsets and times follow from the
seed, as far as the machine allows.

--minutes limits the whole run, start and end included. Each part gets a share of it. A part that does not fit is
skipped, and a fault that is not judged when the share ends does not count. Ctrl-C, SIGTERM and SIGHUP kill all started
processes and print the table of the faults judged so far.

Exit code 1: something was lost, was answered wrongly, hung or stayed behind; or a part of a full run injected too few
faults.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from tests.chaos.record import Injection, Tally, read_injections, render_table, say, seeds
from tests.chaos.time_budget import Need, StoppedError, note_signals, run_part, share_out

PARTS = ("files", "writers", "train", "serve")
LEAST = {"files": 120, "writers": 80, "train": 18, "serve": 9}
"""Fewest faults of a part in a full run."""
ROUNDS = 8
WHOLE_MINUTES = 50.0
NEEDS = {"files": Need(20, 60), "writers": Need(30, 90), "train": Need(300, 1500), "serve": Need(180, 600)}
"""Seconds on two shared cores."""
RESERVE_S = {"files": 2.0, "writers": 10.0, "train": 120.0, "serve": 60.0}
"""From the last fault of a part to its end: running work finishes, nodes and servers shut down."""
END_S = 10.0
"""From the end of the last part to the end of the run."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--minutes", type=float, default=WHOLE_MINUTES, help="limit of the whole run, start and end included"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="faults of each kind in files and writers")
    parser.add_argument("--only", help="KIND/TARGET of a fault in files or writers")
    parser.add_argument("--only-seed", type=int, help="the seed printed with that fault")
    parser.add_argument("--table", type=Path, help="Markdown file of the table")
    parser.add_argument("--record", type=Path, help="JSON lines file of the faults")
    parser.add_argument("--from-records", type=Path, nargs="+", help="inject nothing; print the table of these records")
    parser.add_argument("--alone", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.from_records:
        say(render_table([each for path in options.from_records for each in read_injections(path)]))
        return 0
    if options.alone:
        tally = Tally(options.record, time.monotonic() + options.minutes * 60)
        _run_part(options.alone, Path(os.environ["TMPDIR"]), tally, options)
        return 0
    with _fresh_record(options.record) as record:
        return _run_parts(options, record)


@contextlib.contextmanager
def _fresh_record(wanted: Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        path = wanted or Path(folder) / "faults.jsonl"
        path.write_text("", encoding="utf-8")
        yield path


def _run_parts(options: argparse.Namespace, record: Path) -> int:
    started = time.monotonic()
    until = started + options.minutes * 60 - END_S
    # A tenth in reserve: starts are slow on a busy machine, and an announced part must still get its minimum.
    shares = share_out({part: NEEDS[part] for part in options.parts}, 0.9 * (until - started))
    waiting = {part: NEEDS[part] for part in options.parts if part in shares}
    told = ", ".join(f"{part} {shares[part]:.0f} s" if part in shares else f"{part} skipped" for part in options.parts)
    code, counts = 0, {}
    try:
        with note_signals() as asked:
            say(f"seed {options.seed}, at most {options.minutes:g} minutes in total: {told}")
            for part in options.parts:
                share = share_out(waiting, until - time.monotonic()).get(part)
                waiting.pop(part, None)
                if share is None:
                    say(f"{part}: skipped, it needs at least {NEEDS[part].least:.0f} s")
                    continue
                before = len(read_injections(record))
                ended = _run_apart(part, share, asked, record, options)
                counts[part] = len(read_injections(record)) - before
                if ended is None:
                    say(f"{part}: stopped after its {share:.0f} s; faults not judged by then do not count")
                elif ended:
                    say(f"BROKEN: {part} exited with {ended}, see its message above")
                    code = 1
    except StoppedError as stop:
        say(f"{stop}: all started processes were killed")
        code = stop.exit_code
    return _judge(options, read_injections(record), counts, code, time.monotonic() - started)


def _run_apart(part: str, seconds: float, asked: list[int], record: Path, options: argparse.Namespace) -> int | None:
    """Run one part in its own processes and temporary folder, and remove both at its end."""
    folder = Path(tempfile.mkdtemp(prefix="fl-", dir="/tmp"))  # short, for Ray's sockets
    soft = max(seconds - RESERVE_S[part], seconds / 4)
    only = [f"--only={options.only}"] * bool(options.only) + [f"--only-seed={options.only_seed}"] * (
        options.only_seed is not None
    )
    settings = [f"--seed={options.seed}", f"--rounds={options.rounds}", f"--minutes={soft / 60}", f"--record={record}"]
    try:
        return run_part(command_of(part) + settings + only, seconds, asked, env={**os.environ, "TMPDIR": str(folder)})
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def command_of(part: str) -> list[str]:
    return [sys.executable, "-m", "tests.chaos", f"--alone={part}"]


def _judge(
    options: argparse.Namespace, found: list[Injection], counts: dict[str, int], code: int, seconds: float
) -> int:
    table = render_table(found)
    say("\n" + table)
    if options.table:
        options.table.write_text(table, encoding="utf-8")
    lost = [each for each in found if each.lost]
    is_whole = not options.only and options.rounds >= ROUNDS and options.minutes >= WHOLE_MINUTES and not code
    few = [f"{part}: {n} of {LEAST[part]}" for part, n in counts.items() if is_whole and n < LEAST[part]]
    say(f"{len(found)} faults in {seconds:.0f} s, {len(lost)} with a loss")
    for each in lost:
        say(f"LOST: {each.kind}/{each.target}, seed {each.seed}: {each.lost}")
    for line in few:
        say(f"TOO FEW FAULTS: {line}")
    return code or int(bool(lost or few))


def _run_part(part: str, folder: Path, tally: Tally, options: argparse.Namespace) -> None:
    if part == "files":
        from tests.chaos.files import artefacts_of, damage, make_world

        world = make_world(folder)
        for artefact in artefacts_of(world):
            for kind in ("cut short", "bit flipped"):
                inject(tally, kind, artefact.name, options, lambda seed, a=artefact, k=kind: damage(a, k, seed, folder))
    elif part == "writers":
        from tests.chaos.writers import list_faults

        for kind, target, act in list_faults(folder):
            inject(tally, kind, target, options, act)
    elif part == "train":
        from tests.chaos.search import break_search
        from tests.chaos.train import break_training

        break_training(tally, options.seed)
        break_search(tally, options.seed)
    else:
        from tests.chaos.serve import break_server

        break_server(folder, tally, options.seed)


def inject(tally: Tally, kind: str, target: str, options: argparse.Namespace, act: Callable[[int], Injection]) -> None:
    """Inject a fault --rounds times, each time with another seed."""
    if options.only and options.only != f"{kind}/{target}":
        return
    for seed in islice(seeds(options.seed, kind, target, options.only_seed), options.rounds):
        if tally.is_over:
            return
        tally.add(act(seed))


if __name__ == "__main__":
    sys.exit(main())
