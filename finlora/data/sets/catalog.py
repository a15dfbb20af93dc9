"""Catalog of tasks: every built-in one, found in the modules of data/tasks/, and how a user asks it."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from finlora.data import tasks
from finlora.data.question import PLAIN, Form, Question
from finlora.data.task import Published, Task
from finlora.errors import DatasetError


def _find_tasks() -> Iterator[Task]:
    for module in pkgutil.iter_modules(tasks.__path__):
        yield from getattr(importlib.import_module(f"{tasks.__name__}.{module.name}"), "TASKS", ())


TASKS: Mapping[str, Task] = MappingProxyType(
    {task.name: task for task in sorted(_find_tasks(), key=lambda task: (task.order, task.name))}
)

PUBLISHED: Mapping[str, tuple[Published, ...]] = MappingProxyType(
    {task.name: task.published for task in TASKS.values() if task.published}
)
"""Task -> its published forms. A generated task has none. The content of the hub's XBRL table is unknown."""


def task_named(name: str) -> Task:
    """Return a task of the catalog.

    Raises:
        DatasetError: there is no such task; lists similar names.
    """
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3, cutoff=0.5)
        meant = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(TASKS)}."
        raise DatasetError(f"{name!r} is not a task: {meant}")
    return TASKS[name]


FORMS: Mapping[str, Form] = MappingProxyType({task.name: task.form for task in TASKS.values() if task.form is not None})
"""Form of each task that a user can ask, in the order in which they are listed."""


def make_question(task: str | None, text: str, about: str | None, own: Mapping[str, Form] | None = None) -> Question:
    """Render a user's question.

    Args:
        task: one of FORMS; None: the text is the whole prompt.
        text: the sentence, post, headline or XBRL fragment.
        about: what the user names beside the text, an entity or a question; None or empty: nothing.
        own: forms of tasks of task files, which an adapter or a prepared set brings.

    Raises:
        DatasetError: the text is empty, the task is unknown, or `about` does not fit.
    """
    if not text.strip():
        raise DatasetError("found an empty text: expected the sentence, headline or fragment to ask about.")
    forms = {**FORMS, **(own or {})}
    if task is not None and task not in forms:
        raise DatasetError(f"task {task!r} cannot be asked: expected one of {', '.join(forms)}, or none.")
    return (forms[task] if task else PLAIN).ask(task or "a plain prompt", text, about or "")


def has_free_answer(task: str | None, own: Mapping[str, Form] | None = None) -> bool:
    """Return whether a task's answer is text, quoted from the text that is asked about or written for it, and no label.

    Args:
        own: as in `make_question`.
    """
    form = {**FORMS, **(own or {})}.get(task) if task else None
    return form is not None and not form.choices


def is_papers_test(task: str, data_hash: str | None, num_examples: int, is_partial: bool) -> bool:
    """Return whether a score is on the test split of the paper's score, or the nearest one to it.

    Args:
        data_hash: of the prepared test split.
        num_examples: number of scored examples.
        is_partial: whether they are only part of the split.
    """
    forms = [form for form in PUBLISHED.get(task, ()) if form.variant != "corrected"]
    if not forms:
        return True
    known = {form.test_hash for form in forms if form.test_hash}
    others = {form.test_hash for form in PUBLISHED[task] if form.variant == "corrected"}
    counts = {form.test for form in forms if form.test_hash is None}
    start = (data_hash or "")[:16]
    return start in known or (start not in others and not is_partial and num_examples in counts)


def is_quoted(task: str | None, own: Mapping[str, Form] | None = None) -> bool:
    """Return whether a task's answer should occur in the text that is asked about."""
    form = {**FORMS, **(own or {})}.get(task) if task else None
    return form is not None and not form.choices and form.is_quoted
