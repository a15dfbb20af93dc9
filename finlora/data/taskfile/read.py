"""Reader of a task file's data: rows to items, split, items to examples, with notes on duplicates, leaks, dates and labels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from finlora.data.example import Example, Splits
from finlora.data.task import Request, Task
from finlora.data.taskfile.asking import make_form, render_prompt
from finlora.data.taskfile.items import Item, make_items, make_printable
from finlora.data.taskfile.load import load_task_file
from finlora.data.taskfile.own_tables import read_source
from finlora.data.taskfile.presets import apply_preset
from finlora.data.taskfile.record import YES_NO, TaskFile, hash_question, render_card
from finlora.data.taskfile.split import Parts, split_items
from finlora.data.taskfile.turns import Turn, ask_turns


def open_task_file(path: Path) -> Task:
    """Return the task of a file, the same record as a built-in task's.

    Raises:
        ConfigError: as `load_task_file`.
    """
    task, folder = load_task_file(path), path.absolute().parent
    return make_task(task, lambda request: read_splits(task, folder))


def make_task(task: TaskFile, read: Callable[[Request], Splits] | None = None) -> Task:
    """Return the record of a task file.

    Args:
        read: reader of its rows. None: there are no rows, only a question, as for a task that an adapter brought.
    """

    def refuse(_request: Request) -> Splits:
        raise AssertionError("a task without its file has no rows to read")

    return Task(
        name=task.name,
        title=task.title or task.name,
        licence=task.licence,
        read=read or refuse,
        form=make_form(task),
        choices=task.choices,
        is_free_text=not task.choices,
        hub_id=task.source.hub,
        variants=("own",),
        card=render_card(task),
        card_hash=hash_question(task),
        tolerance=task.number.tolerance,
    )


def read_splits(task: TaskFile, folder: Path) -> Splits:
    """Read every row, map labels, group duplicates, split, and make the examples.

    Args:
        folder: of the task file; its paths are relative to it.

    Raises:
        ConfigError, DatasetError: as `make_items` and `split_items`.
    """
    notes: list[str] = []
    rows = read_source(task.source, folder, has_sides=task.split_by == "files")
    applied = apply_preset(task, rows)
    notes += applied.notes
    items = make_items(task, applied.rows, notes)
    parts = split_items(task, items)
    notes += parts.notes
    sides = {
        "train": _build("train", task, items, parts.train, parts),
        "test": _build("test", task, items, parts.test, parts),
    }
    notes += _list_dates(items, parts)
    notes += _list_labels(task, sides)
    return Splits(train=sides["train"], test=sides["test"], notes=tuple(map(make_printable, notes)))


def _build(side: str, task: TaskFile, items: Sequence[Item], rows: Sequence[int], parts: Parts) -> tuple[Example, ...]:
    examples: list[Example] = []
    for row in rows:
        item = items[row]
        group = item.group or items[parts.groups[row]].text
        questions = list(_list_questions(task, item))
        for number, question in enumerate(questions):
            own = item.id if len(questions) == 1 else f"{item.id}-{question.name or number}"
            examples.append(
                Example(
                    id=f"{task.name}-{side}-{len(examples)}" if item.id is None else str(own),
                    task=task.name,
                    prompt=question.prompt,
                    answer=question.answer,
                    label=question.answer,
                    choices=task.choices,
                    source=item.source,
                    group=group,
                    time=item.time.isoformat() if item.time else "",
                    weight=item.weight,
                    segments=(*item.segments, question.name) if task.kind == "multi" else item.segments,
                    turns=question.turns,
                )
            )
    return tuple(examples)


class _Question(NamedTuple):
    prompt: str
    answer: str
    turns: tuple[Turn, ...] = ()
    """Kind chat: the turns before the answer, unless they are one user message, which needs no chat template."""
    name: str = ""
    """Kind multi: the label asked about."""


def _list_questions(task: TaskFile, item: Item) -> Iterator[_Question]:
    """Yield a row's questions: one for each label of kind multi, one for each trained answer of kind chat, else one."""
    if task.kind == "multi":
        for label in task.labels:
            prompt = render_prompt(task, item.text, label.value)
            yield _Question(prompt, YES_NO[label.value not in item.labels], name=label.value)
    elif task.is_chat:
        first = [role for role, _ in item.turns].index("user")
        ends = [number for number, (role, _) in enumerate(item.turns) if role == "assistant" and number > first]
        for end in ends if task.train_on == "all_assistant" else ends[-1:]:
            asked = ask_turns(item.turns[:end])
            yield _Question(asked.prompt, item.turns[end][1], asked.turns)
    else:
        yield _Question(render_prompt(task, item.text, item.about), item.answer)


def _list_dates(items: Sequence[Item], parts: Parts) -> list[str]:
    spans = []
    for name, rows in (("train", parts.train), ("test", parts.test)):
        times = [time for row in rows if (time := items[row].time) is not None]
        if times:
            spans.append(f"{name} {min(times):%Y-%m-%d} to {max(times):%Y-%m-%d}")
    return [f"Dates: {', '.join(spans)}."] if spans else []


def _list_labels(task: TaskFile, sides: dict[str, tuple[Example, ...]]) -> list[str]:
    """Return each split's shares of the labels and its rarest one, with warnings for labels of no row or one."""
    if not task.choices:
        return []
    notes = []
    for side, examples in sides.items():
        counts = Counter(example.label for example in examples)
        names = [label.value for label in task.labels]
        total = len(examples)
        if task.kind == "multi":  # one example for each label of a row, in the labels' order
            total //= len(names)
            held = (name for example, name in zip(examples, names * total, strict=True) if example.label == YES_NO[0])
            counts = Counter(held)
        shares = ", ".join(
            f"{name} {counts[name] / total:.1%}" for name in sorted(names, key=lambda n: -counts[n])[:20]
        )
        rarest = min(names, key=lambda name: counts[name])
        notes.append(f"Labels of {side}: {shares}; the rarest is {rarest} with {counts[rarest]:,} of {total:,} rows.")
        for name in names:
            if counts[name] == 0:
                notes.append(f"Warning: {side} has no row of {name}: take it out of `labels`, or split otherwise.")
            elif counts[name] == 1:
                notes.append(f"Warning: {side} has a single row of {name}: its scores mean little.")
    return notes
