"""Preparation of a task (`finlora prepare`): reads its raw rows, fixes its split, and writes a prepared set."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path

from finlora.data.sets.catalog import TASKS, task_named
from finlora.data.sets.origin import compare_published
from finlora.data.sets.prepared import PreparedReport, write_prepared
from finlora.data.task import Request, SplitChoice
from finlora.data.taskfile.read import open_task_file
from finlora.errors import ConfigError, DatasetError


def prepare_task(
    name: str,
    source: Path | None,
    output: Path,
    variant: str | None,
    splits: SplitChoice,
    overwrite: bool,
    dry_run: bool,
    is_own: bool = False,
) -> PreparedReport:
    """Prepare one task below `output`.

    Args:
        name: a task of the catalog.
        source: folder of raw files. None: the task's dataset on the hub, or the generator.
        output: folder of all prepared sets; the task's set goes into the subfolder of its name.
        variant: `as_published` or, where the task offers it, `corrected`. None: the task's first variant.
        splits: `all`, or `test` to omit the training split.
        overwrite: replace an existing, different set.
        dry_run: read and check everything, write nothing.
        is_own: accept rows whose counts or labels differ from the published set's.

    Raises:
        DatasetError: an unknown task or variant, a malformed raw row, an unreachable hub, rows that are not the published set's,
            or an existing, different set.
    """
    task = task_named(name)
    chosen = task.variants[0] if variant is None else variant
    if chosen not in task.variants:
        raise DatasetError(
            f"{name} has no variant {chosen!r}: expected {' or '.join(task.variants)}. Correct --variant."
        )
    if task.hub_id is None and source is not None:
        raise DatasetError(f"{name} is generated and reads no files, but --source {source} was given. Leave it out.")
    read = task.read(Request(source=source, variant=chosen, splits=splits))
    said = compare_published(name, chosen, read, is_of_hub=source is None, is_own=is_own)
    read = dataclasses.replace(read, notes=(*said, *read.notes))
    if splits == "test":
        read = dataclasses.replace(read, train=(), notes=(*read.notes, "The training split was left out on request."))
    elif not read.train:
        raise DatasetError(f"{name} has no training example: expected at least one. Check the raw files of --source.")
    origin = f"hub:{task.hub_id}" if task.hub_id is not None else "generated"
    return write_prepared(
        task,
        read,
        output,
        variant=chosen,
        source=origin if source is None else str(source),
        version=code_version(),
        overwrite=overwrite,
        dry_run=dry_run,
    )


def prepare_task_file(path: Path, output: Path, overwrite: bool, dry_run: bool) -> PreparedReport:
    """Prepare the task of a task file below `output`.

    Raises:
        ConfigError: the file is wrong, or its name is a built-in task's; a column is missing.
        DatasetError: a row does not fit, a side of the split is empty, or another set is in the way.
    """
    task = open_task_file(path)
    if task.name in TASKS:
        raise ConfigError(f"task file {path.name}: name={task.name} is a built-in task: choose another name.")
    read = task.read(Request(source=None, variant=task.variants[0], splits="all"))
    return write_prepared(
        task,
        read,
        output,
        variant=task.variants[0],
        source=f"task file {path.name}",
        version=code_version(),
        overwrite=overwrite,
        dry_run=dry_run,
    )


def code_version() -> str:
    """Return FinLoRA's version; a checkout that is not installed has none."""
    try:
        return metadata.version("finlora")
    except metadata.PackageNotFoundError:
        return "not installed"
