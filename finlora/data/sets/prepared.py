"""Prepared sets: OUTPUT/<task>/train.parquet and test.parquet, each with its hash and origin in the Parquet metadata.

A complete folder is renamed to its final name, so a crash leaves the old set or none, never a partial one.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from finlora.data.example import Example, Splits
from finlora.data.sets.catalog import TASKS
from finlora.data.sets.parquet import make_table, read_examples
from finlora.data.task import Task
from finlora.durable import scratch_folder, seal
from finlora.errors import DatasetError

SplitName = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedSplit:
    """One split read back, its hash verified."""

    task: str
    split: SplitName
    variant: str
    examples: tuple[Example, ...]
    hash: str
    """SHA-256 over id, prompt, answer, label, choices and, where set, weight, segments and turns of each example, hex."""
    licence: str
    source: str
    """Origin of the raw rows: a hub id, a folder or the generator."""
    finlora_version: str
    """Version that wrote the set."""
    notes: tuple[str, ...]
    card: str | None = None
    """The task file that asked it, as YAML. None: a built-in task."""
    card_hash: str | None = None
    """Hash of what that file asks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedReport:
    """What `finlora prepare` reports of a set. Mappings are keyed by split."""

    task: str
    variant: str
    folder: Path
    is_written: bool
    """False: the same set existed already, or the run was dry."""
    counts: Mapping[str, int]
    hashes: Mapping[str, str]
    labels: Mapping[str, Mapping[str, int]]
    """Examples a label; empty if every answer is free text."""
    duplicates: Mapping[str, int]
    """Examples whose prompt and answer occur earlier in the split."""
    group_leaks: int
    """Test examples whose group (sentence, headline, entity with its sentence, or filing) is in train."""
    prompt_leaks: int
    """Test examples whose exact prompt is in train."""
    prompt_chars: Mapping[str, tuple[float, int]]
    """Median and longest prompt in characters."""
    notes: tuple[str, ...]


def write_prepared(
    task: Task, splits: Splits, output: Path, *, variant: str, source: str, version: str, overwrite: bool, dry_run: bool
) -> PreparedReport:
    """Write a task's splits below `output`, and return the report. An empty train split gets no file.

    Args:
        task: the catalog's row.
        splits: what the task's reader returned.
        output: folder of all prepared sets.
        variant: kept in the metadata.
        source: origin of the raw rows, kept in the metadata.
        version: version of FinLoRA, kept in the metadata.
        overwrite: replace a set that differs.
        dry_run: check and report, write nothing.

    Raises:
        DatasetError: the test split is empty, an example is faulty, or a different set exists.
    """
    parts: dict[str, tuple[Example, ...]] = {"train": splits.train, "test": splits.test}
    parts = {split: examples for split, examples in parts.items() if examples}
    if "test" not in parts:
        raise DatasetError(f"{task.name} has no test example: expected at least one. Check the raw files of --source.")
    for examples in parts.values():
        _check(examples)
    folder = output / task.name
    hashes = {split: examples_hash(examples) for split, examples in parts.items()}
    is_same = _is_there(folder, task.name, hashes, variant, task.card)
    if not is_same:
        if folder.exists() and not overwrite:
            raise DatasetError(
                f"{folder} holds a different set of {task.name} ({_compare(folder, task, variant)}). Expected the same "
                "examples, or no folder: pass --overwrite to replace it, or choose another --output."
            )
        facts = {"task": task.name, "variant": variant, "licence": task.licence, "source": source, "version": version}
        if task.card is not None:
            facts |= {"card": task.card, "card_hash": task.card_hash or ""}
        if not dry_run:
            _write(folder, parts, hashes, {**facts, "notes": list(splits.notes)})
    return _report(task, variant, folder, parts, hashes, splits.notes, is_written=not (is_same or dry_run))


def require_split(folder: Path, task: str, split: SplitName) -> Path:
    """Return the file of a prepared split.

    Raises:
        DatasetError: it is missing; says what was prepared.
    """
    path = folder / task / f"{split}.parquet"
    if not path.is_file():
        if not folder.is_dir() and folder.exists():
            raise DatasetError(
                f"data.dir={folder} is a file: give the folder that `finlora prepare` wrote its tasks into, with --output."
            )
        why = (
            f"only the test split of {task} was prepared" if (folder / task / "test.parquet").is_file() else "not found"
        )
        raise DatasetError(f"{path}: {why}. Run `{_command(task, folder)}` first.")
    return path


def _command(task: str, folder: Path) -> str:
    """Return the command that prepares a task."""
    return f"finlora prepare {task if task in TASKS else '--task-file FILE'} --output {folder}"


def read_prepared(folder: Path, task: str, split: SplitName) -> PreparedSplit:
    """Read one split of a prepared set and verify its hash.

    Args:
        folder: folder of all prepared sets, as `write_prepared` got it.
        task: the task's name.
        split: `train` or `test`.

    Raises:
        DatasetError: the file is missing, truncated, changed, not written by FinLoRA, or of another task or split.
    """
    path = require_split(folder, task, split)
    again = f"Run `{_command(task, folder)} --overwrite` to write it again."
    try:
        facts, examples = read_examples(path)
    except (pa.ArrowException, OSError, MemoryError, ValueError, TypeError) as error:
        raise DatasetError(f"{path} is not readable Parquet, perhaps truncated ({error}). {again}") from error
    if facts is None:
        raise DatasetError(f"{path} was not written by FinLoRA: expected its columns and metadata. {again}")
    if (facts["task"], facts["split"]) != (task, split):
        raise DatasetError(
            f"{path} holds the {facts['split']} split of {facts['task']}: expected {split} of {task}. {again}"
        )
    found = examples_hash(examples)
    if found != facts["hash"]:
        raise DatasetError(
            f"{path} was changed after it was prepared: its examples hash to {found[:12]}, expected "
            f"{facts['hash'][:12]}. {again}"
        )
    return PreparedSplit(
        task=task,
        split=split,
        variant=facts["variant"],
        examples=examples,
        hash=found,
        licence=facts["licence"],
        source=facts["source"],
        finlora_version=facts["version"],
        notes=tuple(facts["notes"]),
        card=facts.get("card"),
        card_hash=facts.get("card_hash"),
    )


def check_prepared(folder: Path) -> list[str]:
    """Read every split of every prepared set below `folder`, verify the hashes, and return the tasks.

    Raises:
        DatasetError: as `read_prepared`.
    """
    paths = sorted(folder.glob("*/*.parquet"))
    for path in paths:
        read_prepared(folder, path.parent.name, "train" if path.stem == "train" else "test")
    return sorted({path.parent.name for path in paths})


def examples_hash(examples: Sequence[Example]) -> str:
    """Return the SHA-256 over all that a model reads and is scored by, in order, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for item in examples:
        fields: list[object] = [item.id, item.prompt, item.answer, item.label, item.choices]
        if item.weight != 1 or item.segments or item.turns:  # sets without them keep the hash that they had
            fields += [item.weight, item.segments, item.turns]
        digest.update(json.dumps(fields, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def _check(examples: Sequence[Example]) -> None:
    for item in examples:
        if not item.prompt.strip() or not item.answer.strip():
            raise DatasetError(f"{item.source}: {item.id} has a blank prompt or answer. Correct the raw row.")
        if item.choices and item.answer not in item.choices:
            raise DatasetError(
                f"{item.source}: {item.id} answers {item.answer!r}, expected one of {', '.join(item.choices)}. "
                "Correct the raw row."
            )


def _is_there(folder: Path, task: str, hashes: Mapping[str, str], variant: str, card: str | None) -> bool:
    """Return whether the folder holds exactly these splits, all readable."""
    if {path.name for path in folder.glob("*")} != {f"{split}.parquet" for split in hashes}:
        return False
    names: tuple[SplitName, ...] = ("train", "test")
    try:
        found = [read_prepared(folder.parent, task, split) for split in names if split in hashes]
    except DatasetError:
        return False  # an unreadable set counts as a different one: the caller refuses or overwrites it
    return all(item.hash == hashes[item.split] and (item.variant, item.card) == (variant, card) for item in found)


def _compare(folder: Path, task: Task, variant: str) -> str:
    """Return what differs, in brackets of a message: the variant, or the hashes of two questions."""
    try:
        there = read_prepared(folder.parent, task.name, "test")
    except DatasetError:
        return variant
    if there.card_hash != task.card_hash:
        return f"task hash {(there.card_hash or 'of no task file')[:12]} there, {(task.card_hash or 'of no task file')[:12]} here"
    return variant if there.card is None else "the same question, other rows or another split"


def _write(
    folder: Path, parts: Mapping[str, Sequence[Example]], hashes: Mapping[str, str], facts: Mapping[str, object]
) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(folder.parent, f".{folder.name}-") as scratch:
            fresh = scratch / "fresh"
            fresh.mkdir()
            for split, examples in parts.items():
                whole = {**facts, "split": split, "hash": hashes[split], "count": len(examples)}
                # Page checksums too: the hash of the examples does not cover source and group.
                pq.write_table(make_table(examples, seal(whole)), fresh / f"{split}.parquet", write_page_checksum=True)
            _move_in(fresh, folder, scratch / "old")
    except OSError as error:
        raise DatasetError(
            f"{folder} cannot be written ({error}): expected a writable --output with free space."
        ) from error


def _move_in(fresh: Path, folder: Path, old: Path) -> None:
    if not folder.exists():
        fresh.replace(folder)
        return
    # A folder with files cannot be replaced: the old set is renamed first, and renamed back if the new one fails.
    folder.replace(old)
    try:
        fresh.replace(folder)
    except OSError:
        old.replace(folder)
        raise


def _report(
    task: Task,
    variant: str,
    folder: Path,
    parts: Mapping[str, Sequence[Example]],
    hashes: Mapping[str, str],
    notes: tuple[str, ...],
    *,
    is_written: bool,
) -> PreparedReport:
    train, test = parts.get("train", ()), parts["test"]
    group_leaks, prompt_leaks = count_leaks(train, test)
    lengths = {split: [len(item.prompt) for item in examples] for split, examples in parts.items()}
    return PreparedReport(
        task=task.name,
        variant=variant,
        folder=folder,
        is_written=is_written,
        counts={split: len(examples) for split, examples in parts.items()},
        hashes=dict(hashes),
        labels={split: count_labels(examples) for split, examples in parts.items()},
        duplicates={
            split: len(items) - len({(item.prompt, item.answer) for item in items}) for split, items in parts.items()
        },
        group_leaks=group_leaks,
        prompt_leaks=prompt_leaks,
        prompt_chars={split: (median(values), max(values)) for split, values in lengths.items()},
        notes=notes,
    )


def count_leaks(train: Sequence[Example], test: Sequence[Example]) -> tuple[int, int]:
    """Return how many test examples have a group that is in train, and how many have their exact prompt there."""
    groups, prompts = {item.group for item in train}, {item.prompt for item in train}
    return sum(item.group in groups for item in test), sum(item.prompt in prompts for item in test)


def count_labels(examples: Sequence[Example]) -> dict[str, int]:
    """Return label -> examples, the most frequent first; free text has none."""
    return dict(Counter(item.label for item in examples if item.choices).most_common())
