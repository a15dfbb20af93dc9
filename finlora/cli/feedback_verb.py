"""Command `finlora feedback`: the next training set from corrected answers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from finlora.cli.app import DryRun, app, console, say
from finlora.errors import counted
from finlora.machine.working_dir import resolve_output
from finlora.terminal import open_bars

_MAX_SHOWN = 20


@app.command(
    epilog="Examples:\n\n  finlora feedback corrections.csv --task letters --output ~/finlora/data-2\n\n"
    "  finlora feedback corrections.jsonl --task fpb --output ~/finlora/data-2 --audit ~/finlora/audit"
)
def feedback(
    corrections: Annotated[
        Path,
        typer.Argument(help="Table of corrections: csv, tsv, jsonl, json or parquet, with columns task, text, label."),
    ],
    task: Annotated[str, typer.Option(help="Prepared task; rows of other tasks are left alone.")],
    output: Annotated[Path, typer.Option(help="Folder of the next prepared tasks.")],
    data: Annotated[Path, typer.Option(help="Folder of the present prepared tasks, which stay.")] = Path(
        "~/finlora/data"
    ),
    audit: Annotated[
        Path | None,
        typer.Option(
            help="Audit log of the server, or a folder of them: for the model's labels, and texts where it has any."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a next set that differs.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Add corrected answers to the training rows of a task and leave its test split as it is: the next training set."""
    from finlora.feedback.next_set import LEFT_OUT, make_next_set
    from finlora.printed_table import print_table
    from finlora.terminal import show_preparation

    target = resolve_output("--output ", output)
    with open_bars(console, f"reading {corrections.name}"):
        made = make_next_set(
            corrections.expanduser(),
            task,
            data.expanduser(),
            target,
            audit.expanduser() if audit else None,
            overwrite=overwrite,
            dry_run=dry_run,
        )
    read = made.corrections
    if read.ignored_columns:
        say(f"Columns that are not read: {', '.join(read.ignored_columns)}")
    if read.other_tasks:
        others = ", ".join(f"{name} {count:,}" for name, count in read.other_tasks.items())
        say(f"Rows of other tasks, left alone: {others}")
    if read.duplicates:
        say(f"Dropped: {counted(len(read.duplicates), 'row')} that an earlier one says already")
    left = [(each, fate, owner) for each, fate, owner in made.fates if fate in LEFT_OUT]
    for each, fate, owner in left[:_MAX_SHOWN]:
        say(f"Left out: {each.source}, {fate}: {owner}")
    if len(left) > _MAX_SHOWN:
        say(f"Left out: {len(left) - _MAX_SHOWN:,} more, see the table")
    kinds = ("confirms", "corrects", "unknown")
    rows = [
        (label, *(f"{counts.get(kind, 0):,}" for kind in kinds))
        for label, counts in sorted(made.count_labels().items())
    ]
    header = ("right label", "as the model said", "corrects the model", "model's label unknown")
    print_table(console, header, rows, right=(1, 2, 3))
    num_known = sum(fate == "in train" for _, fate, _ in made.fates)
    if num_known:
        say(f"In the training rows already: {num_known:,}")
    if made.num_replaced:
        say(f"Replaced: {counted(made.num_replaced, 'training row')} with another label for the same text")
    show_preparation(made.report, console, is_dry=dry_run)
    if not dry_run:
        say(f"What became of each correction: {made.table}")
        say(f"Train on it: finlora train --config CONFIG name=NAME data.dir={made.report.folder.parent}")
