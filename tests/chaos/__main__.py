"""Break the system on purpose, at random places and times, and look at what is lost: nothing may be.

    make chaos                                                   # all kinds, at most 50 minutes
    make chaos MINUTES=5                                         # what fits into 5 minutes
    python -m tests.chaos --parts files writers --seed 7    # without Ray, about two minutes
    python -m tests.chaos --parts train serve --minutes 15
    python -m tests.chaos --parts files --only "bit flipped/checkpoint" --only-seed 123456  # one fault again

Parts: `files` damages what lies on disk; `writers` kills, fills the disk of, or holds up processes that write, and breaks a
training loop in a process of its own; `train` kills processes of `finlora train` and `finlora tune` on Ray nodes of this machine;
`serve` kills those of `finlora serve` under load. Each fault has a seed of its own, which is printed: places and times follow
from it, as far as the machine lets them.

--minutes bounds everything, start and end included: each part has a share, a part for which there is no room is left out, and
what a part has not judged when its share is over does not count. Ctrl-C, SIGTERM and SIGHUP end all that was started and show the
table of what was judged until then.

Exit code 1: something was lost, was answered wrongly, hung, or stayed behind; or a part of a whole run saw too few faults.
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
"""Faults that a part must reach for its table to mean something."""
ROUNDS = 8
WHOLE_MINUTES = 50.0
NEEDS = {"files": Need(20, 60), "writers": Need(30, 90), "train": Need(300, 1500), "serve": Need(180, 600)}
"""On two cores that others use as well."""
RESERVE_S = {"files": 2.0, "writers": 10.0, "train": 120.0, "serve": 60.0}
"""From a part's last fault to its end: what was begun is waited for, and nodes and servers end."""
END_S = 10.0
"""From the end of the last part to the end of all."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=WHOLE_MINUTES, help="for everything, start and end included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="faults of each cheap kind")
    parser.add_argument("--only", help="KIND/TARGET of a cheap fault")
    parser.add_argument("--only-seed", type=int, help="the seed that was printed with it")
    parser.add_argument("--table", type=Path, help="Markdown file of the table")
    parser.add_argument("--record", type=Path, help="JSON lines file of the faults")
    parser.add_argument(
        "--from-records", type=Path, nargs="+", help="inject nothing, print the table of earlier records"
    )
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
    # A tenth less than there is: starts take longer on a busy machine, and a part that was promised must still find its least.
    shares = share_out({part: NEEDS[part] for part in options.parts}, 0.9 * (until - started))
    waiting = {part: NEEDS[part] for part in options.parts if part in shares}
    told = ", ".join(f"{part} {shares[part]:.0f} s" if part in shares else f"{part} left out" for part in options.parts)
    code, counts = 0, {}
    try:
        with note_signals() as asked:
            say(f"seed {options.seed}, at most {options.minutes:g} minutes in all: {told}")
            for part in options.parts:
                share = share_out(waiting, until - time.monotonic()).get(part)
                waiting.pop(part, None)
                if share is None:
                    say(f"{part}: left out, {NEEDS[part].least:.0f} s are the least for it")
                    continue
                before = len(read_injections(record))
                ended = _run_apart(part, share, asked, record, options)
                counts[part] = len(read_injections(record)) - before
                if ended is None:
                    say(f"{part}: its {share:.0f} s are over; what was not judged by then does not count")
                elif ended:
                    say(f"BROKEN: {part} ended with {ended}, its message stands above")
                    code = 1
    except StoppedError as stop:
        say(f"{stop}: all that was started has been ended")
        code = stop.exit_code
    return _judge(options, read_injections(record), counts, code, time.monotonic() - started)


def _run_apart(part: str, seconds: float, asked: list[int], record: Path, options: argparse.Namespace) -> int | None:
    """Run one part in processes and in a folder of its own, which go with it."""
    folder = Path(tempfile.mkdtemp(prefix="fl-", dir="/tmp"))  # short: Ray puts sockets below it
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
        from tests.chaos.search import run_search_under_fire
        from tests.chaos.train import run_training_under_fire

        run_training_under_fire(tally, options.seed)
        run_search_under_fire(tally, options.seed)
    else:
        from tests.chaos.serve import run_server_under_fire

        run_server_under_fire(folder, tally, options.seed)


def inject(tally: Tally, kind: str, target: str, options: argparse.Namespace, act: Callable[[int], Injection]) -> None:
    """Inject a cheap fault as often as asked for, each time with another seed."""
    if options.only and options.only != f"{kind}/{target}":
        return
    for seed in islice(seeds(options.seed, kind, target, options.only_seed), options.rounds):
        if tally.is_over:
            return
        tally.add(act(seed))


if __name__ == "__main__":
    sys.exit(main())
