"""Verbs that make what training starts from: prepared tasks, and a small base where no hub is reachable."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finlora.cli.app import OVERRIDES, DryRun, app, console, say
from finlora.errors import ConfigError, ModelError
from finlora.machine.host import require_output
from finlora.machine.working_dir import resolve_output
from finlora.terminal import open_bars


@app.command(
    epilog="Examples:\n\n  finlora prefetch --models meta-llama/Llama-3.1-8B-Instruct --tasks fpb,ner --output /mnt/mirror\n\n"
    "  finlora prefetch --adapters FinGPT/fingpt-mt_llama2-7b_lora --output /mnt/mirror\n\n"
    "  finlora prefetch --check --output /mnt/mirror"
)
def prefetch(
    output: Annotated[Path, typer.Option(help="Folder of the mirror.")] = Path("~/finlora/mirror"),
    models: Annotated[
        str, typer.Option(help="Base models, separated by commas: owner/name or owner/name@revision.")
    ] = "",
    adapters: Annotated[
        str, typer.Option(help="PEFT adapters for `finlora adopt`, separated by commas: as --models.")
    ] = "",
    tasks: Annotated[
        str, typer.Option(help="Tasks to prepare into it from the hub's data sets, separated by commas.")
    ] = "",
    check: Annotated[
        bool, typer.Option("--check", help="Read a whole mirror and compare its hashes. Needs no network.")
    ] = False,
) -> None:
    """Copy base models, adapters and data sets of the hub into a folder, for machines without a hub. Checks every hash."""
    from finlora.data.sets.catalog import task_named
    from finlora.data.sets.prepare import prepare_task
    from finlora.data.sets.prepared import check_prepared
    from finlora.model.mirror import check_mirrored, list_mirrored, mirror_adapter, mirror_model

    names, others, wanted = _split(models), _split(adapters), [task_named(name) for name in _split(tasks)]
    if check == bool(names or others or wanted):
        raise ConfigError("give either --check, or what to fetch with --models, --adapters and --tasks.")
    folder = (resolve_output if check else require_output)("--output ", output)
    with open_bars(console, "reading the mirror" if check else "asking the hub") as bars:
        fetched = [("models", mirror_model(name, folder, bars.update)) for name in names]
        fetched += [("adapters", mirror_adapter(name, folder, bars.update)) for name in others]
        found = {folder / kind / mirrored.repository: mirrored for kind, mirrored in fetched}
        if check:
            found = {path: check_mirrored(path, bars.update) for path in list_mirrored(folder)}
    for where, mirrored in found.items():
        use = "finlora adopt " if where.parents[1].name == "adapters" else "model.base="
        say(f"{use}{where}: {mirrored.total_bytes / 2**30:.2f} GiB of commit {mirrored.commit[:12]}, hashes agree")
    for task in wanted:
        prepare_task(task.name, None, folder / "data", None, "all", False, False)
    prepared = check_prepared(folder / "data") if check else [task.name for task in wanted]
    if prepared:
        say(f"data.dir={folder / 'data'}: {', '.join(prepared)}, hashes agree")
    if check and not (found or prepared):
        raise ModelError(
            f"{folder} holds no mirrored model or adapter and no prepared task: give the folder of a mirror with --output."
        )
    say("Where no hub is reachable, set HF_HUB_OFFLINE=1 and these settings.")


@app.command(
    "new-task",
    epilog="Examples:\n\n  finlora new-task letters.csv\n\n  finlora new-task letters.csv --example\n\n"
    "  finlora new-task complaints.csv --label department\n\n  finlora new-task export.jsonl --output tasks/letters.yaml",
)
def new_task(
    table: Annotated[Path, typer.Argument(help="Table to look at: csv, tsv, jsonl, json, parquet or arrow.")],
    output: Annotated[
        Path | None, typer.Option(help="Task file to write. Default: beside the table, with its name and .yaml.")
    ] = None,
    label: Annotated[str | None, typer.Option(help="Column of the labels. Default: it is guessed.")] = None,
    example: Annotated[
        bool, typer.Option("--example", help="Write an example table first: generated letters to a bank, as CSV.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
) -> None:
    """Write a first task file for a table of your own: what was found in it, and what was guessed, marked as a guess."""
    from finlora.data.sets.catalog import TASKS
    from finlora.data.taskfile.example_table import write_example
    from finlora.data.taskfile.first_file import write_first_file
    from finlora.durable import write_whole

    source = table.expanduser()
    target = resolve_output("--output ", output) if output is not None else source.with_suffix(".yaml")
    if target.exists() and not overwrite:
        raise ConfigError(f"{target} is there already: pass --overwrite to replace it, or choose another --output.")
    if example:
        if source.suffix != ".csv" or source.exists():
            found = "is there already" if source.exists() else "is not a CSV file"
            raise ConfigError(f"{source} {found}: --example writes a new file, such as letters.csv.")
        rows = write_example(require_output("", source, is_new=True))
        say(f"Example table of {rows:,} generated letters written to {source}")
    if not source.is_file():
        raise ConfigError(
            f"{source} is not a file: expected a table, as csv or jsonl. --example writes one of generated letters there."
        )
    with open_bars(console, f"reading {source.name}"):
        file = write_first_file(source, target.absolute().parent, list(TASKS), label)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, file.text)
    for guess in file.guesses:
        say(f"Guessed {guess}")
    say(f"Written to {target}. Correct the lines with `guess` in it, then: finlora prepare --task-file {target}")


@app.command(
    epilog="Examples:\n\n  finlora prepare fpb --source /mnt/raw/fpb\n\n"
    "  finlora prepare ner --source /mnt/raw/ner --variant corrected --output /mnt/data\n\n  finlora prepare synthetic\n\n"
    "  finlora prepare --task-file letters.yaml"
)
def prepare(
    task: Annotated[str | None, typer.Argument(help="Built-in task to prepare. `list` shows all.")] = None,
    task_file: Annotated[
        Path | None, typer.Option("--task-file", help="Task file of your own data, in place of a built-in task.")
    ] = None,
    source: Annotated[Path | None, typer.Option(help="Folder with the raw files. Default: the hub's data set.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of prepared tasks.")] = Path("~/finlora/data"),
    variant: Annotated[
        Literal["as_published", "corrected"] | None,
        typer.Option(help="Labels as published, or with known defects corrected. Default: as published."),
    ] = None,
    splits: Annotated[Literal["all", "test"], typer.Option(help="`test`: the test split only.")] = "all",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a prepared task that differs.")] = False,
    own_data: Annotated[
        bool,
        typer.Option("--own-data", help="Accept rows that are not the published data set: a part of it, or your own."),
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Turn raw data into Parquet files with a fixed train and test split. Shows counts, labels, duplicates and leaks."""
    from finlora.data.sets.prepare import prepare_task, prepare_task_file
    from finlora.terminal import show_preparation, show_tasks

    if (task is None) == (task_file is None):
        raise ConfigError("give a built-in task (`finlora prepare list` shows them) or --task-file FILE, and not both.")
    if task_file is not None:
        if source is not None or variant is not None or own_data or splits != "all":
            raise ConfigError(
                "--source, --variant, --splits and --own-data are of built-in tasks: a task file says all this itself."
            )
        target = resolve_output("--output ", output)
        with open_bars(console, f"preparing {task_file.name}"):
            report = prepare_task_file(task_file.expanduser(), target, overwrite, dry_run)
        show_preparation(report, console, is_dry=dry_run)
        return
    if task == "list":
        show_tasks(console)
        return
    folder = source.expanduser() if source else None
    target = resolve_output("--output ", output)
    with open_bars(console, f"preparing {task}"):
        report = prepare_task(task or "", folder, target, variant, splits, overwrite, dry_run, own_data)
    show_preparation(report, console, is_dry=dry_run)


@app.command(
    epilog="Example:\n\n  finlora pretrain --tasks fpb,tfns --data ~/finlora/data --output ~/finlora/base-small"
)
def pretrain(
    output: Annotated[Path, typer.Option(help="Folder of the new base model.")],
    tasks: Annotated[
        str,
        typer.Option(
            help="Prepared tasks whose training texts are used, separated by commas; `synthetic`: generated texts."
        ),
    ],
    data: Annotated[Path, typer.Option(help="Folder of prepared tasks.")] = Path("~/finlora/data"),
    device: Annotated[Literal["cuda", "cpu"], typer.Option(help="Device to train on.")] = "cuda",
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar=OVERRIDES, help="Settings, such as num_steps=280.")
    ] = None,
) -> None:
    """Pretrain a small base with a tokenizer of its own on training texts without labels. Needs no hub."""
    from finlora.configfile import settings_from_tree
    from finlora.model.pretrain import PretrainConfig, run_pretraining
    from finlora.precision import AUTO, describe_cpu

    settings, folder = settings_from_tree(PretrainConfig, {}, overrides or []), resolve_output("--output ", output)
    if settings.precision == AUTO and device == "cpu":
        say(describe_cpu())
    with open_bars(console, "making texts and tokenizer") as bars:
        summary = run_pretraining(settings, _split(tasks), data.expanduser(), folder, device, bars.update)
    say(summary)


def _split(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
