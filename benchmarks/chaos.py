"""Break the system on purpose, at random places and times, and look at what is lost: nothing may be.

    make chaos                                                   # all kinds, about 40 minutes on two quiet cores
    python benchmarks/chaos.py --parts files writers --seed 7    # without Ray, about two minutes
    python benchmarks/chaos.py --parts train serve --minutes 15
    python benchmarks/chaos.py --parts files --only "bit flipped/checkpoint" --only-seed 123456  # one fault again

Parts: `files` damages what lies on disk; `writers` kills, fills the disk of, or holds up processes that write, and breaks a
training loop in a process of its own; `train` kills processes of `finlora train` and `finlora tune` on Ray nodes of this machine;
`serve` kills those of `finlora serve` under load. Each fault has a seed of its own, which is printed: places and times follow
from it, as far as the machine lets them. Bounded by --minutes: what is not reached then is not counted.

Exit code 1: something was lost, was answered wrongly, hung, or stayed behind; or a part saw too few faults.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from chaos_record import Injection, Tally, read_injections, render_table, say, seeds

PARTS = ("files", "writers", "train", "serve")
LEAST = {"files": 120, "writers": 80, "train": 18, "serve": 9}
"""Faults that a part must reach for its table to mean something."""
ROUNDS = 8


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=50.0, help="no fault is injected after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="faults of each cheap kind")
    parser.add_argument("--only", help="KIND/TARGET of a cheap fault")
    parser.add_argument("--only-seed", type=int, help="the seed that was printed with it")
    parser.add_argument("--table", type=Path, help="Markdown file of the table")
    parser.add_argument("--record", type=Path, help="JSON lines file of the faults")
    parser.add_argument(
        "--from-records", type=Path, nargs="+", help="inject nothing, print the table of earlier records"
    )
    options = parser.parse_args(arguments)
    if options.from_records:
        say(render_table([each for path in options.from_records for each in read_injections(path)]))
        return 0
    started = time.monotonic()
    tally = Tally(options.record, started + options.minutes * 60)
    say(f"seed {options.seed}, parts {', '.join(options.parts)}, at most {options.minutes:g} minutes")
    counts = {}
    for part in options.parts:
        before = len(tally.injections)
        folder = Path(tempfile.mkdtemp(prefix="fl-", dir="/tmp"))  # short: Ray puts sockets below it
        try:
            _run_part(part, folder, tally, options)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        counts[part] = len(tally.injections) - before
    table = render_table(tally.injections)
    say("\n" + table)
    if options.table:
        options.table.write_text(table, encoding="utf-8")
    lost = [each for each in tally.injections if each.lost]
    is_whole = not options.only and options.rounds >= ROUNDS
    few = [f"{part}: {n} of {LEAST[part]}" for part, n in counts.items() if is_whole and n < LEAST[part]]
    say(f"{len(tally.injections)} faults in {time.monotonic() - started:.0f} s, {len(lost)} with a loss")
    for each in lost:
        say(f"LOST: {each.kind}/{each.target}, seed {each.seed}: {each.lost}")
    for line in few:
        say(f"TOO FEW FAULTS: {line}")
    return int(bool(lost or few))


def _run_part(part: str, folder: Path, tally: Tally, options: argparse.Namespace) -> None:
    if part == "files":
        from chaos_files import artefacts_of, damage, make_world

        world = make_world(folder)
        for artefact in artefacts_of(world):
            for kind in ("cut short", "bit flipped"):
                inject(tally, kind, artefact.name, options, lambda seed, a=artefact, k=kind: damage(a, k, seed, folder))
    elif part == "writers":
        from chaos_writers import list_faults

        for kind, target, act in list_faults(folder):
            inject(tally, kind, target, options, act)
    elif part == "train":
        from chaos_search import run_search_under_fire
        from chaos_train import run_training_under_fire

        run_training_under_fire(tally, options.seed)
        run_search_under_fire(tally, options.seed)
    else:
        from chaos_serve import run_server_under_fire

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
