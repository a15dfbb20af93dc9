"""Next training set: the prepared training rows and the corrections, beside an unchanged test split.

The test split stays byte for byte, so that scores before and after compare. A correction whose text stands in it, equal or nearly
equal, is left out: nothing is trained on a test text.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finlora.data.example import Example, Splits
from finlora.data.sets.catalog import TASKS
from finlora.data.sets.prepare import code_version
from finlora.data.sets.prepared import PreparedReport, PreparedSplit, read_prepared, write_prepared
from finlora.data.task import Task
from finlora.data.taskfile.duplicates import group_duplicates
from finlora.data.taskfile.items import NO_SEGMENT
from finlora.data.taskfile.load import read_card
from finlora.data.taskfile.read import make_task
from finlora.data.taskfile.record import TaskFile
from finlora.data.taskfile.turns import join_user_turns
from finlora.durable import write_whole
from finlora.errors import ConfigError, DatasetError, counted
from finlora.feedback.asked import PromptReader
from finlora.feedback.corrections import COLUMNS, Correction, Corrections, form_of, read_corrections
from finlora.serve.accounts.audit import hash_text

Fate = Literal["added", "replaces", "in train", "duplicate", "in test", "near test", "group in test"]
"""What became of a correction: a new training row; one in place of rows with another label; already a training row; said twice;
its text is in the test split; it is nearly equal to a test text; its group is in the test split."""
ANY_ANSWER = "(free answers)"
"""Name of the row that counts the answers of a task without labels."""
LEFT_OUT: tuple[Fate, ...] = ("in test", "near test", "group in test")


@dataclass(frozen=True, kw_only=True, slots=True)
class NextSet:
    """What `finlora feedback` reports."""

    report: PreparedReport
    fates: tuple[tuple[Correction, Fate, str], ...]
    """Each correction in the order of the table's rows, with the id of the test example that keeps it out."""
    num_replaced: int
    """Old training rows that gave way to a correction with another label."""
    table: Path
    corrections: Corrections
    has_labels: bool
    """Whether the task has labels; False: free answers."""

    def count_labels(self) -> dict[str, dict[str, int]]:
        """Return right label -> number of corrections that confirm the model, correct it, or do not know its label.

        Those that are left out and duplicates do not count. Free answers count together, as ANY_ANSWER.
        """
        found: dict[str, Counter[str]] = {}
        for each, fate, _ in self.fates:
            if fate in ("added", "replaces", "in train"):
                kind = "unknown" if not each.answered else "confirms" if each.answered == each.label else "corrects"
                found.setdefault(each.label if self.has_labels else ANY_ANSWER, Counter())[kind] += 1
        return {label: dict(counts) for label, counts in found.items()}


def make_next_set(
    table: Path, task_name: str, data: Path, output: Path, audit: Path | None, *, overwrite: bool, dry_run: bool
) -> NextSet:
    """Read corrections, merge them with a prepared task, and write the next prepared set below `output`.

    Args:
        table: of corrections.
        data: folder of prepared tasks, which stays as it is.
        output: folder of the next prepared tasks, with a table TASK.corrections.csv of what became of each correction.
        audit: audit log, or a folder of them; None: each correction holds its text.

    Raises:
        ConfigError: `output` is `data`.
        DatasetError: the task is not prepared, a correction cannot be used, or none is left to train on.
        ResultError: the audit log is missing or was changed.
    """
    if not table.is_file():
        raise ConfigError(f"{table} is not a file: expected a table of corrections, as CSV or JSON lines.")
    if output.resolve() == data.resolve():
        raise ConfigError(
            f"--output {output} is the folder of the present set, which stays as it is: give another folder."
        )
    train, test = (read_prepared(data, task_name, split) for split in ("train", "test"))
    card = read_card(train.card) if train.card else None
    task = make_task(card) if card else TASKS[task_name]
    corrections = read_corrections(table, task, audit)
    fates = _judge(corrections, task, card, train, test)
    changed = {each.prompt for each, fate, _ in fates if fate == "replaces"}
    used = [each for each, fate, _ in fates if fate in ("added", "replaces")]
    if not used:
        raise DatasetError(
            f"none of {counted(len(corrections.kept), 'correction')} of {task_name} changes the training rows: "
            f"{_count(fates)}. Collect more, or train on the present set."
        )
    kept = [example for example in train.examples if example.prompt not in changed]
    folding = {example.answer: example.label for example in train.examples if example.choices}
    is_multi = card is not None and card.kind == "multi"
    choices, num_segments = form_of(task).choices, len(card.columns.segments) if card else 0
    merged = (*kept, *(_make_example(each, choices, folding, num_segments, is_multi) for each in used))
    num_replaced = len(train.examples) - len(kept)
    notes = [
        f"Next set of {train.hash[:12]} ({counted(len(train.examples), 'example')}): {counted(len(used), 'correction')} of "
        f"{table.name} added, {counted(num_replaced, 'example')} replaced. The test split is unchanged."
    ]
    notes += _list_notes(task.name, card, used, fates)
    report = write_prepared(
        task,
        Splits(train=merged, test=test.examples, notes=tuple(notes)),
        output,
        variant=train.variant,
        source=f"{train.source}; corrections {table.name}",
        version=code_version(),
        overwrite=overwrite,
        dry_run=dry_run,
    )
    path = output / f"{task_name}.corrections.csv"
    if not dry_run:
        try:
            write_whole(path, _render(fates))
        except OSError as error:
            raise DatasetError(
                f"{path} cannot be written ({error}): expected a writable --output with free space."
            ) from error
    return NextSet(
        report=report,
        fates=fates,
        num_replaced=num_replaced,
        table=path,
        corrections=corrections,
        has_labels=bool(choices),
    )


def _judge(
    corrections: Corrections, task: Task, card: TaskFile | None, train: PreparedSplit, test: PreparedSplit
) -> tuple[tuple[Correction, Fate, str], ...]:
    """Return what becomes of each correction."""
    reader = PromptReader(form_of(task))
    kept = corrections.kept
    texts = [join_user_turns(example.turns) or reader.read_text(example.prompt) for example in test.examples]
    owners = {text: example.id for text, example in zip(reversed(texts), reversed(test.examples), strict=True)}
    groups = group_duplicates([*texts, *(each.compared for each in kept)])
    has_groups = card is not None and card.columns.group is not None
    tested = {example.group: example.id for example in reversed(test.examples)} if has_groups else {}
    answers: dict[str, set[str]] = {}
    for example in train.examples:
        answers.setdefault(example.prompt, set()).add(example.answer)
    fates: list[tuple[Correction, Fate, str]] = []
    for number, each in enumerate(kept):
        root = groups.find(len(texts) + number)
        if each.compared in owners:
            fates.append((each, "in test", owners[each.compared]))
        elif root < len(texts):
            fates.append((each, "near test", test.examples[root].id))
        elif each.group in tested:
            fates.append((each, "group in test", tested[each.group]))
        elif each.prompt not in answers:
            fates.append((each, "added", ""))
        else:
            fates.append((each, "in train" if answers[each.prompt] == {each.label} else "replaces", ""))
    fates += [(each, "duplicate", "") for each in corrections.duplicates]
    return tuple(fates)


def _make_example(
    each: Correction, choices: tuple[str, ...], folding: Mapping[str, str], num_segments: int, is_multi: bool
) -> Example:
    return Example(
        id=f"{each.task}-correction-{hash_text(each.prompt)[:12]}",
        task=each.task,
        prompt=each.prompt,
        answer=each.label,
        label=folding.get(each.label, each.label),
        choices=choices,
        source=each.source,
        group=each.group or each.compared,
        time=each.time,
        segments=(NO_SEGMENT,) * num_segments + ((each.about,) if is_multi else ()),
        turns=each.turns,
    )


def _list_notes(
    name: str, card: TaskFile | None, used: Sequence[Correction], fates: Sequence[tuple[Correction, Fate, str]]
) -> list[str]:
    notes = []
    if left := Counter(fate for _, fate, _ in fates if fate in LEFT_OUT):
        notes.append(
            f"Left out {counted(left.total(), 'correction')}, to train on no test text: "
            + ", ".join(f"{count} {fate}" for fate, count in left.items())
            + "."
        )
    if card is None:
        return notes
    alone = sum(not each.group for each in used)
    if card.columns.group is not None and alone:
        notes.append(
            f"Warning: {counted(alone, 'correction')} without `group`: whether their `{card.columns.group}` is in the test split "
            "is unknown, so scores can be too good."
        )
    if card.split_by == "time":
        notes.append(
            f"Warning: {name} is split by time, and corrections may be later than its test split (from "
            f"{card.split.test_from}): its scores then say nothing about newer texts."
        )
    return notes


def _count(fates: Sequence[tuple[Correction, Fate, str]]) -> str:
    return ", ".join(f"{count} {fate}" for fate, count in Counter(fate for _, fate, _ in fates).items())


def _render(fates: Sequence[tuple[Correction, Fate, str]]) -> str:
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["source", "fate", "test_example", *COLUMNS])
    for each, fate, owner in fates:
        writer.writerow([each.source, fate, owner, *(getattr(each, name) for name in COLUMNS)])
    return stream.getvalue()
