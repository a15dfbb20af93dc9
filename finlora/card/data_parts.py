"""Parts of a card on data and prompt: rows, hashes, split rule, leaks between train and test, licences, a rendered example."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from finlora.card.evidence import LICENCE_FIELD, Evidence, TaskData
from finlora.card.part import Block, Code, Part, list_facts, make_part
from finlora.card.profile import FIELDS_FILE
from finlora.data.encode import encode_answer, encode_asked
from finlora.data.example import Example
from finlora.data.question import Form
from finlora.data.sets.catalog import FORMS, TASKS
from finlora.data.sets.prepared import PreparedSplit, count_labels, count_leaks
from finlora.data.taskfile.duplicates import group_duplicates
from finlora.data.taskfile.load import read_card
from finlora.errors import FinloraError
from finlora.model.contract import CONTRACT_FILE, TASKS_FILE
from finlora.report.tables import TextTable

_MAX_LABELS = 50
_MAX_CHARS = 20_000_000
"""Characters of distinct texts up to which nearly equal ones are looked for: some ten seconds."""


def describe_data(evidence: Evidence) -> Part:
    """Rows, labels, hashes and split rule of each task."""
    blocks: list[Block] = []
    gaps = []
    for task in evidence.tasks:
        gaps += [f"{task.name}: {reason}" for reason in task.why_not]
        blocks.append(list_facts(_list_data(evidence, task), title=f"Data: {task.name}"))
        some = task.test or task.train
        if some and some.notes:
            blocks.append(
                TextTable(title=f"Notes of `finlora prepare`: {task.name}", header=("note",), rows=_column(some))
            )
        if labels := _count_labels(task):
            blocks.append(labels)
    return make_part("data", "Data", blocks, [task.folder for task in evidence.tasks], gaps)


def describe_leaks(evidence: Evidence) -> Part:
    """Test rows that share a group or the whole prompt with the training rows."""
    rows, gaps = [], []
    for task in evidence.tasks:
        if task.train is None or task.test is None:
            gaps.append(
                f"{task.name}: leaks between train and test: both splits are needed ({'; '.join(task.why_not)})"
            )
            continue
        num_test = len(task.test.examples)
        shared, same = count_leaks(task.train.examples, task.test.examples)
        rows += [
            (task.name, "their group is in train too", _count(shared, num_test), str(task.folder)),
            (task.name, "their whole prompt is in train too", _count(same, num_test), str(task.folder)),
        ]
        if task.test.card is None:
            alike = count_alike(task.train.examples, task.test.examples, FORMS.get(task.name))
            if alike is None:
                gaps.append(
                    f"{task.name}: nearly equal texts in train and test: not looked for, its rows do not hold the text by itself"
                )
            else:
                rows.append((task.name, "a nearly equal text is in train", _count(alike, num_test), str(task.folder)))
    table = TextTable(
        title="Test rows that train has seen",
        header=("task", "test rows", "count", "source"),
        rows=tuple(rows),
        notes=(
            "Group: the sentence, headline, entity or filing, or the task file's column. Nearly equal: their 5-character pieces, "
            "without case and digits, agree to 80 %; for a task file the notes on its data count them.",
        ),
    )
    return make_part("leaks", "Leaks between train and test", [table] if rows else [], [], gaps)


def describe_licences(evidence: Evidence) -> Part:
    """Licences of data and base."""
    rows: list[tuple[str, object, object]] = []
    gaps = []
    for task in evidence.tasks:
        split = task.train or task.test
        if split is not None:
            rows.append((f"data of {task.name}", split.licence, task.folder))
        elif card := evidence.cards.get(task.name):
            rows.append((f"data of {task.name}", read_card(card).licence, TASKS_FILE))
        elif task.name in TASKS:
            rows.append((f"data of {task.name}", TASKS[task.name].licence, "FinLoRA's catalog"))
        else:
            rows.append((f"data of {task.name}", None, "its prepared data is not here"))
            gaps.append(f"{task.name}: licence of the data: {'; '.join(task.why_not)}")
        if split is not None and split.licence == "not stated":
            gaps.append(f"{task.name}: licence of the data: its task file does not state it (licence:)")
    licence = evidence.licence
    if licence is None:
        where = evidence.base.folder or "its folder, which is not on this machine,"
        rows.append(("base", None, where))
        gaps.append(
            f"licence of the base: {where} has no README.md with `license` and no LICENSE file. Write it into {FIELDS_FILE} as "
            f"{LICENCE_FIELD}"
        )
    else:
        rows.append(("base", *licence))
    return make_part("licences", "Licences", [list_facts(rows)], [], gaps)


def describe_prompt(evidence: Evidence, *, has_texts: bool = True) -> Part:
    """A whole rendered example of each task, as the model reads it."""
    blocks: list[Block] = []
    gaps = []
    for task in evidence.tasks:
        split = task.test or task.train
        if not has_texts:
            gaps.append(f"{task.name}: a rendered example: left out on request (--no-texts)")
        elif split is None:
            gaps.append(f"{task.name}: a rendered example: {'; '.join(task.why_not)}")
        else:
            text, answer, why = _render(evidence, split)
            example = split.examples[0]
            blocks.append(Code(f"{example.id} of the {split.split} split, {task.folder}", text))
            blocks.append(Code("The right answer", answer))
            if why:
                gaps.append(f"{task.name}: the prompt's own tokens: {why}; the text above is without them")
    return make_part("prompt", "Prompt", blocks, [], gaps)


def count_alike(train: Sequence[Example], test: Sequence[Example], form: Form | None) -> int | None:
    """Return how many test examples have a text that is equal or nearly equal to one in train.

    Args:
        form: of the task. None: it is not asked by its name.

    Returns:
        None where an example's text is not known by itself, as a filing's, or there is too much text.
    """
    texts = list(dict.fromkeys(example.group for example in (*train, *test)))
    if form is None or sum(map(len, texts)) > _MAX_CHARS:
        return None
    if not all(_is_text(example, form) for example in (*train, *test)):
        return None
    groups = group_duplicates(texts)
    roots = {text: groups.find(row) for row, text in enumerate(texts)}
    seen = {roots[example.group] for example in train}
    return sum(roots[example.group] in seen for example in test)


def _is_text(example: Example, form: Form) -> bool:
    """Return whether an example's group is the text that its prompt asks about."""
    return any(form.render(example.group, about) == example.prompt for about in form.about_values or ("",))


def _list_data(evidence: Evidence, task: TaskData) -> Iterator[tuple[str, object, object]]:
    train, test, here = task.train, task.test, task.folder
    some = test or train
    card = evidence.cards.get(task.name)
    title = TASKS[task.name].title if task.name in TASKS else _title_of(some.card if some else card)
    yield "what it is", title, "FinLoRA's catalog" if task.name in TASKS else here
    yield "rows come from", some.source if some else None, here
    yield "variant", some.variant if some else None, here
    yield "split rule", describe_split(some, card), here if some else TASKS_FILE
    yield "training rows", f"{len(train.examples):,}" if train else None, here
    yield "test rows", f"{len(test.examples):,}" if test else None, here
    yield "hash of the training rows", evidence.contract.data_hashes.get(task.name), CONTRACT_FILE
    hashes = {scored.result.task: (scored.result.data_hash, scored.source) for scored in evidence.scored}
    digest, source = hashes.get(task.name, (test.hash if test else None, here))
    yield "hash of the test rows", digest, source
    yield "hash of the question", evidence.contract.tasks.get(task.name, "none: built-in task"), CONTRACT_FILE


def describe_split(split: PreparedSplit | None, card: str | None) -> str | None:
    """Return the rule by which rows became train or test; None where nothing says it.

    Args:
        card: task file of the adapter, where it has one.
    """
    card = split.card if split and split.card else card
    if card is None:
        if split is None:
            return None
        if split.source == "generated":
            return "as FinLoRA's generator makes it"
        return f"as the published set has it ({split.variant}); the notes say how the rows relate to it"
    task = read_card(card)
    values = {**dataclasses.asdict(task.split), "by": task.split_by}
    return ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)


def _title_of(card: str | None) -> str | None:
    if card is None:
        return None
    task = read_card(card)
    return task.title or task.name


def _column(split: PreparedSplit) -> tuple[tuple[str, ...], ...]:
    return tuple((note,) for note in split.notes)


def _count_labels(task: TaskData) -> TextTable | None:
    counts = {split.split: count_labels(split.examples) for split in (task.train, task.test) if split is not None}
    names = sorted(dict.fromkeys(name for each in counts.values() for name in each))
    if not names:
        return None
    totals = {split: sum(each.values()) for split, each in counts.items()}
    rows = tuple(
        (name, *(_count(each.get(name, 0), totals[split]) for split, each in counts.items()))
        for name in names[:_MAX_LABELS]
    )
    notes = (f"{len(names) - _MAX_LABELS:,} further labels are left out.",) if len(names) > _MAX_LABELS else ()
    return TextTable(title=f"Labels: {task.name}", header=("label", *counts), rows=rows, notes=notes)


def _render(evidence: Evidence, split: PreparedSplit) -> tuple[str, str, str]:
    """Return the first example's prompt with the base's own tokens, its answer, and why the tokens are missing."""
    example = split.examples[0]
    files, contract = evidence.base.files, evidence.contract
    if files is None:
        return example.prompt, example.answer, evidence.base.why_no_files
    template: Literal["raw", "chat"] = "chat" if contract.template == "chat" else "raw"
    try:
        prompt = encode_asked(example, files.tokenizer, template, contract.template_date)
        answer = encode_answer(example.answer, files.tokenizer, template)
    except FinloraError as error:
        return example.prompt, example.answer, str(error)
    return files.tokenizer.decode(prompt), files.tokenizer.decode(answer), ""


def _count(number: int, total: int) -> str:
    return f"{number:,} of {total:,} ({100 * number / total:.1f} %)" if total else "0"
