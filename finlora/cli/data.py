"""Verbs that make what training starts from: prepared tasks, and a small base where no hub is reachable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finlora.cli.app import DryRun, Overrides, app, console, say
from finlora.terminal import open_bars


@app.command(
    epilog="Examples:\n\n  finlora prepare fpb --source /mnt/raw/fpb\n\n"
    "  finlora prepare ner --source /mnt/raw/ner --variant corrected --output /mnt/data\n\n  finlora prepare synthetic"
)
def prepare(
    task: Annotated[str, typer.Argument(help="Task to prepare; `list` shows all of them.")],
    source: Annotated[
        Path | None, typer.Option(help="Folder with the raw files. Without it: the hub's dataset.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of prepared tasks.")] = Path("~/finlora/data"),
    variant: Annotated[
        Literal["as_published", "corrected"] | None,
        typer.Option(help="Keep or mend known label defects, where both exist."),
    ] = None,
    splits: Annotated[Literal["all", "test"], typer.Option(help="`test`: only the test split.")] = "all",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a prepared set that differs.")] = False,
    dry_run: DryRun = False,
) -> None:
    """Turn raw data into Parquet with a frozen, hashed split; shows counts, labels, duplicates and leaks."""
    from finlora.data.prepare import prepare_task
    from finlora.terminal import show_preparation, show_tasks

    if task == "list":
        show_tasks(console)
        return
    folder = source.expanduser() if source else None
    report = prepare_task(task, folder, output.expanduser(), variant, splits, overwrite, dry_run)
    show_preparation(report, console, is_dry=dry_run)


@app.command(
    epilog="Example:\n\n  finlora pretrain --tasks fpb,tfns --data ~/finlora/data --output ~/finlora/base-small"
)
def pretrain(
    output: Annotated[Path, typer.Option(help="Folder of the new base model.")],
    tasks: Annotated[str, typer.Option(help="Prepared tasks whose train inputs are the text; `synthetic`: generated.")],
    data: Annotated[Path, typer.Option(help="Folder of prepared tasks.")] = Path("~/finlora/data"),
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Never chosen for you.")] = "cuda",
    overrides: Overrides = None,
) -> None:
    """Pretrain a small Llama base with its own tokenizer on unlabelled training text (no hub needed)."""
    from finlora.configfile import build_settings
    from finlora.model.pretrain import PretrainConfig, run_pretraining

    settings = build_settings(PretrainConfig, overrides or [])
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    with open_bars(console) as bars:
        summary = run_pretraining(settings, names, data.expanduser(), output.expanduser(), device, bars.update)
    say(summary)
