"""Corrections of a model's answers: a table of texts with their right labels, read and checked against task and audit log.

The columns are those of `Correction`, and they stay: the web page and other programs write such tables too.
"""

from __future__ import annotations

import contextlib
import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finlora.data.question import Form
from finlora.data.raw.rows import shorten
from finlora.data.sets.catalog import FORMS
from finlora.data.task import Task
from finlora.data.taskfile.items import read_number
from finlora.data.taskfile.load import read_card
from finlora.data.taskfile.own_tables import TableRow, as_text, read_table
from finlora.data.taskfile.turns import Turn, ask_turns, join_user_turns, read_asked_turns
from finlora.errors import DatasetError, counted
from finlora.feedback.asked import Asked, PromptReader, hash_asked, read_logged
from finlora.serve.accounts.audit import AuditEntry, find_entries, hash_text, list_logs

_MAX_SHOWN = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Correction:
    """Row of the table, after its text was found."""

    task: str
    """Task that was asked."""
    label: str
    """The right label; of kind multi Yes or No; of kinds number, text and chat the right answer. A task file's `from` counts as
    its label."""
    text: str = ""
    """The text that was asked about; of kind chat a single user message. Empty: it is taken from the audit log."""
    about: str = ""
    """The entity or question that was named beside the text, if the task asks that; of kind multi the label."""
    answered: str = ""
    """The model's label. Empty: it is taken from the audit log, or unknown."""
    request_id: str = ""
    """`X-Request-Id` of the reply, as in the audit log; or the reply's `id`, which the OpenAI endpoints begin with `chatcmpl-` or
    `cmpl-`."""
    index: str = ""
    """Number of the text in its request, from 0. Needed only for a request of several texts."""
    group: str = ""
    """What the task file's `columns.group` names, such as the customer. Empty: unknown."""
    by: str = ""
    """Who corrected it."""
    time: str = ""
    """When, in ISO 8601."""
    comment: str = ""
    """Any remark. Nothing reads it."""
    messages: str = ""
    """Of kind chat, in place of `text`: the conversation up to the answer, a list of messages with `role` and `content`. A CSV
    field holds it as JSON."""
    source: str = field(default="", metadata={"is_column": False})
    """File and line."""
    prompt: str = field(default="", metadata={"is_column": False})
    """As the task renders it."""
    turns: tuple[Turn, ...] = field(default=(), metadata={"is_column": False})
    """Of kind chat: the turns before the answer, unless they are one user message."""

    @property
    def compared(self) -> str:
        """What the user said, by which a test text is recognised."""
        return join_user_turns(self.turns) or self.text


COLUMNS = tuple(each.name for each in fields(Correction) if each.metadata.get("is_column", True))
"""Columns of the table, in the order in which they are written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corrections:
    """Checked corrections of one task, each question once."""

    kept: tuple[Correction, ...]
    duplicates: tuple[Correction, ...]
    """Rows that say again what an earlier one says."""
    other_tasks: Mapping[str, int]
    """Task -> rows of it, which are left alone."""
    ignored_columns: tuple[str, ...]


def read_corrections(path: Path, task: Task, audit: Path | None) -> Corrections:
    """Read and check the corrections of a task.

    Args:
        path: csv, tsv, jsonl, json or parquet.
        task: with a form; its labels are those of `form.choices`.
        audit: audit log, or a folder of them. None: each correction holds its text.

    Raises:
        DatasetError: lists each row that does not fit: an unknown label, no text, a request that the log does not have, two
            different labels for one question.
        ResultError: the audit log is missing or was changed.
    """
    rows = [TableRow(values, source, "") for values, source in read_table(path)]
    there = dict.fromkeys(name for row in rows for name in row.fields)
    missing = [name for name in ("task", "label") if name not in there]
    if missing:
        near = [found for name in missing for found in difflib.get_close_matches(name, there, n=1, cutoff=0.5)]
        hint = f" Did you mean {' and '.join(near)}?" if near else ""
        raise DatasetError(
            f"{path.name} has no column {' and no column '.join(missing)}: found {', '.join(list(there)[:20])}; expected some of "
            f"{', '.join(COLUMNS)}.{hint}"
        )
    own, others = [], Counter[str]()
    for row in rows:
        name = _text(row, "task")
        if name == task.name or (task.asked_as and name == task.asked_as):
            own.append(row)
        else:
            others[name or "(none)"] += 1
    if not own:
        raise DatasetError(
            f"{path.name} corrects {', '.join(others)}, and nothing of {task.name}: choose another --task."
        )
    wanted = {name for row in own if (name := _read_request_id(row))}
    log: dict[str, list[AuditEntry]] = {}
    for file in list_logs(audit) if audit is not None else ():
        for name, entries in find_entries(file, wanted).items():
            log.setdefault(name, []).extend(entries)
    checker = _Checker(task, log if audit is not None else None)
    found, faults = [], []
    for row in own:
        try:
            found.append(checker.check(row))
        except DatasetError as error:
            faults.append(f"{row.source}: {str(error).removeprefix(f'{row.source}, ')}")
    faults += _list_contradictions(found)
    if faults:
        more = f"\n  and {len(faults) - _MAX_SHOWN:,} more" if len(faults) > _MAX_SHOWN else ""
        shown = "".join(f"\n  - {fault}" for fault in faults[:_MAX_SHOWN])
        raise DatasetError(f"{path.name}: {counted(len(faults), 'fault')} in its corrections:{shown}{more}")
    kept: dict[str, Correction] = {}
    for each in found:
        kept.setdefault(each.prompt, each)
    return Corrections(
        kept=tuple(kept.values()),
        duplicates=tuple(each for each in found if kept[each.prompt] is not each),
        other_tasks=dict(others),
        ignored_columns=tuple(name for name in there if name not in COLUMNS),
    )


def _list_contradictions(found: Sequence[Correction]) -> list[str]:
    """Return a fault for each question that has two labels, with its rows."""
    by_prompt: dict[str, list[Correction]] = {}
    for each in found:
        by_prompt.setdefault(each.prompt, []).append(each)
    return [
        f"{', '.join(f'{each.source} says {shorten(each.label)}' for each in rows[:_MAX_SHOWN])} for the same text: agree on one "
        "label, and take the other rows out"
        for rows in by_prompt.values()
        if len({each.label for each in rows}) > 1
    ]


def form_of(task: Task) -> Form:
    """Return how a task is asked, a generated set's by the published task.

    Raises:
        DatasetError: users cannot ask it.
    """
    form = FORMS[task.asked_as] if task.asked_as else task.form
    if form is None:
        raise DatasetError(
            f"{task.name} cannot be asked, so that its answers cannot be corrected: choose another --task."
        )
    return form


class _Checker:
    """Checker of single rows.

    Args:
        log: request id -> its entries. None: there is no audit log.
    """

    def __init__(self, task: Task, log: Mapping[str, Sequence[AuditEntry]] | None) -> None:
        self._task, self._log, self._form = task, log, form_of(task)
        self._card = read_card(task.card) if task.card else None
        self._reader = PromptReader(self._form)
        self._labels = {choice: choice for choice in self._form.choices}
        if self._card is not None and self._card.kind in ("choice", "yes_no"):
            self._labels |= {text: label.value for label in self._card.labels for text in label.from_}
        self._by_hash = {hash_text(choice): choice for choice in self._form.choices}

    def check(self, row: TableRow) -> Correction:
        """Return the correction of a row, with its text and, where it is known, the model's label.

        Raises:
            DatasetError: it does not fit.
        """
        values = {name: _text(row, name) for name in COLUMNS if name != "messages"}
        values["request_id"] = _read_request_id(row)
        label = self._label(row, values["label"])
        if values["time"]:
            values["time"] = _read_time(values["time"])
        if turns := self._read_messages(row):
            if values["text"].strip():
                raise DatasetError("text and messages are both filled in: leave one of them empty")
            asked, entry = Asked("", values["about"], turns), None
        else:
            asked, entry = self._find(values, row.source)
        if (self._form.about == "none") != (not asked.about):
            raise DatasetError(
                f"about is empty: name the {self._form.about} that was asked"
                if not asked.about
                else f"about={shorten(asked.about)}: {self._task.name} does not ask that, leave it empty"
            )
        if self._card is not None and self._card.is_chat:
            prompt, turns = ask_turns(asked.turns or self._read_turns([{"role": "user", "content": asked.text}], row))
        else:
            prompt, turns = self._form.ask(self._task.name, asked.text, asked.about).prompt, ()
        entry = entry or self._confirm(values["request_id"], prompt, turns)
        values |= {"task": self._task.name, "label": label, "text": asked.text, "about": asked.about}
        values["messages"] = _render_turns(asked.turns)
        values["answered"] = self._answered(values["answered"], label, entry)
        return Correction(**values, source=row.source, prompt=prompt, turns=turns)

    def _read_messages(self, row: TableRow) -> tuple[Turn, ...]:
        """Return the conversation of a row's own column. Empty: it has none."""
        raw = row.fields.get("messages")
        if raw is None or (isinstance(raw, str) and not raw.strip()):
            return ()
        if self._card is None or not self._card.is_chat:
            raise DatasetError(
                f"messages={shorten(raw)}: only a task of kind chat has them, give {self._task.name} a text"
            )
        if isinstance(raw, str):
            try:
                raw = json.loads(raw)
            except (ValueError, RecursionError):
                raise DatasetError(
                    f'messages={shorten(raw)}: expected JSON, such as [{{"role": "user", "content": "..."}}]'
                ) from None
        return self._read_turns(raw, row)

    def _read_turns(self, raw: Any, row: TableRow) -> tuple[Turn, ...]:
        assert self._card is not None
        return read_asked_turns(self._card, raw, row.source)

    def _label(self, row: TableRow, label: str) -> str:
        if not label.strip():
            raise DatasetError("label is empty: expected the right label")
        if not self._form.choices:
            is_number = self._card is not None and self._card.kind == "number"
            return read_number(self._card, label, row.source) if self._card and is_number else label
        if label not in self._labels:
            near = difflib.get_close_matches(label.strip().casefold(), self._labels, n=1, cutoff=0.5)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise DatasetError(
                f"label {shorten(label)} is not one of {self._task.name}{meant}: expected "
                f"{', '.join(list(self._labels)[:_MAX_SHOWN])}"
            )
        return self._labels[label]

    def _find(self, values: Mapping[str, str], source: str) -> tuple[Asked, AuditEntry | None]:
        """Return the text and question of a row, and the entry of the audit log if they are from there."""
        if values["text"].strip():
            return Asked(values["text"], values["about"]), None
        request_id, index = values["request_id"], values["index"]
        if not request_id or self._log is None:
            raise DatasetError(
                "text is empty: fill it in"
                + (", or give the server's audit log with --audit" if request_id else ", or give the request_id")
            )
        entries = self._entries(request_id)
        if index:
            if not any(str(entry.index) == index for entry in entries):
                raise DatasetError(
                    f"request {request_id!r} has no text of index {index}: it has {len(entries)}, from 0"
                )
            entries = [entry for entry in entries if str(entry.index) == index]
        if len({entry.prompt_hash for entry in entries}) > 1:
            raise DatasetError(f"request {request_id!r} has {len(entries)} texts: say which one under index, from 0")
        entry = entries[-1]
        if entry.prompt is None:
            raise DatasetError(
                "text is empty, and the audit log holds hashes of texts alone (audit_texts is off): fill the text in"
            )
        logged = read_logged(entry)
        if isinstance(logged, list) and self._card is not None and self._card.is_chat:
            return Asked("", "", read_asked_turns(self._card, logged, source)), entry
        asked = self._reader.read(logged) if isinstance(logged, str) else None
        if asked is None:
            raise DatasetError(f"request {request_id!r} did not ask {self._task.name}: correct task or request_id")
        return asked, entry

    def _entries(self, request_id: str) -> Sequence[AuditEntry]:
        entries = (self._log or {}).get(request_id, ())
        if not entries:
            raise DatasetError(
                f"the audit log has no request {request_id!r}: correct request_id, or give the log that has it"
            )
        return entries

    def _confirm(self, request_id: str, prompt: str, turns: Sequence[Turn]) -> AuditEntry | None:
        """Return the entry of a text that the row itself holds. None: there is no log, or no request is named."""
        if not request_id or self._log is None:
            return None
        hashes = hash_asked(prompt, turns)
        found = [entry for entry in self._entries(request_id) if entry.prompt_hash in hashes]
        if not found:
            raise DatasetError(
                f"request {request_id!r} did not ask {self._task.name} about this text: the hash of its prompt differs"
            )
        return found[-1]

    def _answered(self, given: str, label: str, entry: AuditEntry | None) -> str:
        """Return the model's label or answer: the row's, else the log's. Empty: unknown."""
        if given and self._form.choices:
            if given not in self._labels:
                raise DatasetError(
                    f"answered={shorten(given)} is not a label of {self._task.name}: leave it empty if unknown"
                )
            given = self._labels[given]
        given = self._tidy(given)
        logged = ""
        if entry is not None:
            by_hash = self._by_hash | {hash_text(text): text for text in (label, given)}
            logged = self._tidy(entry.output or by_hash.get(entry.output_hash or "", ""))
        if given and logged and given != logged:
            raise DatasetError(f"answered={shorten(given)}, and the audit log says {shorten(logged)}: correct the row")
        return given or logged

    def _tidy(self, answer: str) -> str:
        """Return a free answer as right answers are written: without spaces around it, a number in the task's form."""
        if self._form.choices or self._card is None:
            return answer
        if self._card.kind == "number":
            with contextlib.suppress(DatasetError):
                return read_number(self._card, answer, "")
        return answer.strip()


def _render_turns(turns: Sequence[Turn]) -> str:
    """Return a conversation as a CSV field holds it. Empty: there is none."""
    return (
        json.dumps([{"role": role, "content": content} for role, content in turns], ensure_ascii=False) if turns else ""
    )


def _text(row: TableRow, name: str) -> str:
    try:
        return as_text(row.fields.get(name)) or ""
    except TypeError as error:
        raise DatasetError(f"{row.source}, column {name}: found {error}, expected a text or a number.") from None


def _read_request_id(row: TableRow) -> str:
    """Return the id that the audit log has: a reply of the OpenAI endpoints puts its kind before it."""
    return _text(row, "request_id").strip().removeprefix("chatcmpl-").removeprefix("cmpl-")


def _read_time(text: str) -> str:
    """Return a time in ISO 8601 without a time zone, converted to UTC if it had one."""
    try:
        time = datetime.fromisoformat(text.strip())
    except ValueError:
        raise DatasetError(f"time={shorten(text)}: expected ISO 8601, such as 2026-11-30T09:15") from None
    return (time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)).isoformat()
