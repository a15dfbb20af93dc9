"""Task file: a user's own data and question, as typed keys, and the hash of what it asks.

The keys are fixed, so that a file outlives versions of FinLoRA. load.py reads and checks them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from finlora.configfile import key_of

Kind = Literal["choice", "yes_no", "multi", "number", "text", "chat"]
Preset = Literal["alpaca", "sharegpt", "openai", "label_studio", "prodigy", "doccano", "argilla"]
YES_NO = ("Yes", "No")
CHAT_PRESETS = ("sharegpt", "openai")
MAX_LABELS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    files: str | None = None
    """One file or a glob, from the task file's folder: csv, tsv, jsonl, json, parquet or arrow."""
    train: str | None = None
    """File or glob of the training rows, with `test` beside it."""
    test: str | None = None
    """File or glob of the test rows."""
    hub: str | None = None
    """Dataset on the Hugging Face hub, as owner/name. Its scripts are never run."""
    revision: str | None = None
    """Commit of the hub dataset, 40 hex digits: another commit could hold other rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """A nested value of JSON or Parquet is named with dots: `data.text`."""

    id: str | None = None
    """Identifier of the row, each one once. null: rows are numbered."""
    text: str = "text"
    """Text that is asked about; for kind text the prompt."""
    label: str = "label"
    """Label of kinds choice and yes_no."""
    labels: str = "labels"
    """Labels of kind multi: a list, or a text with `separator` between them; empty: none of them."""
    question: str | None = None
    """What is asked about the text, kinds yes_no and number. null: `prompt.instruction` asks each text the same."""
    answer: str = "answer"
    """Answer of kinds number and text."""
    messages: str = "messages"
    """Messages of kind chat: a list of objects with `role` and `content`."""
    group: str | None = None
    """Column whose rows belong together, such as the customer: scores are clustered by it, and a split can keep it whole."""
    time: str | None = None
    """Date or time of the row, such as 2024-12-31, or in `time_format`."""
    weight: str | None = None
    """Number that scales the loss of the row in training."""
    segments: tuple[str, ...] = ()
    """Columns by which scores are reported too, such as desk and country."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    value: str
    """What the model answers."""
    from_: tuple[str, ...] = ()
    """What the column may hold for it, beside the value itself. Each is compared character by character."""
    means: str | None = None
    """What the label means, in the prompt's words. null: the prompt has its value alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    text: str
    """Text of the example in the prompt."""
    label: str
    """Its answer."""
    question: str | None = None
    """Its question, where each row has its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    system: str | None = None
    """Text before the instruction; for kind chat the system message of a conversation without one."""
    instruction: str | None = None
    """Question to each text. Kind multi: `{label}` stands for the label that is asked."""
    example: Shot | None = None
    """One answered example in the prompt. It is never taken from the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    by: Literal["share", "group", "time", "column", "files"] | None = None
    """How rows become train or test. null: `files` where `source` names both, else `share`."""
    test_share: float = 0.2
    """by share or group: share of the rows that test, more than 0 and less than 1."""
    seed: int = 1
    """by share or group: seed of the permutation of the rows."""
    test_from: str | None = None
    """by time: first day of the test rows, as 2025-01-01."""
    gap_days: int = 0
    """by time: days before `test_from` whose rows are left out."""
    keep_together: Literal["group"] | None = None
    """by time: `group` keeps the rows of a group on the side of its last date; its rows before the test are left out."""
    column: str | None = None
    """by column: column that holds `train` or `test`."""
    duplicates: Literal["together", "apart"] = "together"
    """by share, group or time: `together` keeps equal and nearly equal texts on one side; `apart` splits row by row, as published
    benchmarks do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    unit: str | None = None
    """Unit that the prompt names. null: none."""
    decimals: int | None = None
    """Decimals of the answer, to which the column's numbers are rounded. null: as the column writes them."""
    tolerance: float = 0.01
    """Relative distance within which a number counts as right, at least 0 and less than 1."""
    decimal_mark: Literal[".", ","] = "."
    """Mark before the decimals in the column; the other one separates thousands. The model answers with a point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    user: tuple[str, ...] = ("user", "human")
    """Roles of the data that are the user."""
    assistant: tuple[str, ...] = ("assistant", "gpt")
    """Roles of the data that are the model."""
    system: tuple[str, ...] = ("system", "developer")
    """Roles of the data that are the system message."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    name: str
    """Name of the task in every verb: a to z, 0 to 9 and _, first a letter; not that of a built-in task."""
    kind: Kind
    """`choice`: one of the labels. `yes_no`: one of two. `multi`: a Yes/No question for each label. `number`: a number read from
    the text. `text`: free text. `chat`: a conversation."""
    title: str = ""
    """What the task is, in a line."""
    licence: str = "not stated"
    """Licence of the data."""
    source: Source = dataclasses.field(default_factory=Source)
    preset: Preset | None = None
    """Form in which a tool exports: sets columns, and for alpaca, sharegpt and openai the messages. null: `columns` says."""
    columns: Columns = dataclasses.field(default_factory=Columns)
    labels: tuple[Label, ...] = ()
    """Labels in the order of the prompt, of tables and at ties."""
    unlabelled: Literal["error", "skip"] = "error"
    """What happens to a row without a declared label: `skip` leaves it out and counts it."""
    separator: str = "|"
    """Kind multi: what stands between two labels."""
    time_format: str | None = None
    """Form of the times in `columns.time`, such as %d/%m/%Y. null: such as 2024-12-31, with or without a time of day."""
    number: Number = dataclasses.field(default_factory=Number)
    roles: Roles = dataclasses.field(default_factory=Roles)
    train_on: Literal["last", "all_assistant"] = "last"
    """Kind chat: the assistant's messages that are learnt; `all_assistant` makes an example of each."""
    prompt: Prompt = dataclasses.field(default_factory=Prompt)
    split: Split = dataclasses.field(default_factory=Split)

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed answers of one question; empty: free text."""
        if self.kind == "multi":
            return YES_NO
        return tuple(label.value for label in self.labels) if self.kind in ("choice", "yes_no") else ()

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat"

    @property
    def split_by(self) -> str:
        """How rows become train or test, the default filled in."""
        return self.split.by or ("files" if self.source.train or self.source.test else "share")


def to_tree(task: TaskFile) -> dict[str, Any]:
    """Return plain dicts, lists and scalars, defaults included; `task_file_from_tree` reads them back equal."""
    return _plain(dataclasses.asdict(task))  # type: ignore[no-any-return]


def render_card(task: TaskFile) -> str:
    """Return the task file as YAML with its defaults filled in, as prepared data and adapters carry it."""
    return yaml.safe_dump(to_tree(task), sort_keys=False, allow_unicode=True)


def hash_question(task: TaskFile) -> str:
    """Return the SHA-256 of what a model is asked and may answer: two files of one hash ask the same. 64 hex digits.

    Where the rows come from, how they are split and what the column calls a label take no part.
    """
    tree = to_tree(task)
    asked = {key: tree[key] for key in ("kind", "prompt", "number", "train_on")}
    asked["labels"] = [[label["value"], label["means"]] for label in tree["labels"]]
    asked["has_question"] = task.columns.question is not None
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key_of(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value
