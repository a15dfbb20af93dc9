"""Typed keys of a task file, which describes a user's own data and question, and the hash of the question.

The keys stay as they are, so that a file works with later versions of FinLoRA. load.py reads and checks them.
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
    """One file or a glob, relative to the task file's folder: csv, tsv, jsonl, json, parquet or arrow."""
    train: str | None = None
    """File or glob of the training rows; needs `test` too."""
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
    """Unique identifier of the row. null: rows are numbered."""
    text: str = "text"
    """Text that the question is about; for kind text the prompt."""
    label: str = "label"
    """Label of kinds choice and yes_no."""
    labels: str = "labels"
    """Labels of kind multi: a list, or a text with `separator` between them; empty: no label."""
    question: str | None = None
    """The row's own question, for kinds yes_no and number. null: `prompt.instruction` is the question to each text."""
    answer: str = "answer"
    """Answer of kinds number and text."""
    messages: str = "messages"
    """Messages of kind chat: a list of objects with `role` and `content`."""
    group: str | None = None
    """Column whose equal values belong together, such as a customer: intervals of scores are clustered by it, and a split can
    keep such rows together."""
    time: str | None = None
    """Date or time of the row, such as 2024-12-31 or in `time_format`."""
    weight: str | None = None
    """Number that scales the loss of the row in training."""
    segments: tuple[str, ...] = ()
    """Columns such as desk and country, each value of which also gets its own score."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    value: str
    """What the model answers."""
    from_: tuple[str, ...] = ()
    """Other texts in the column that mean this label. They must match exactly."""
    means: str | None = None
    """Meaning of the label, added to the prompt. null: the prompt has its value alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shot:
    text: str
    """Text of the example in the prompt."""
    label: str
    """Its answer."""
    question: str | None = None
    """Its question, if each row has its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    system: str | None = None
    """Text before the instruction; for kind chat the system message of a conversation without one."""
    instruction: str | None = None
    """Question to each text. Kind multi: `{label}` stands for the label asked about."""
    example: Shot | None = None
    """One answered example in the prompt, not taken from the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    by: Literal["share", "group", "time", "column", "files"] | None = None
    """How rows become train or test. null: `files` if `source` has `train` and `test`, else `share`."""
    test_share: float = 0.2
    """by share or group: share of the test rows, more than 0 and less than 1."""
    seed: int = 1
    """by share or group: seed of the permutation of the rows."""
    test_from: str | None = None
    """by time: first day of the test rows, such as 2025-01-01."""
    gap_days: int = 0
    """by time: days before `test_from` whose rows are left out."""
    keep_together: Literal["group"] | None = None
    """by time: `group` puts all rows of a group into the split of its last date. If that is the test, its rows before `test_from`
    are left out."""
    column: str | None = None
    """by column: column that holds `train` or `test`."""
    duplicates: Literal["together", "apart"] = "together"
    """by share, group or time: `together` keeps equal and nearly equal texts in the same split; `apart` splits row by row, as
    published benchmarks do."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Number:
    unit: str | None = None
    """Unit that the prompt names. null: none."""
    decimals: int | None = None
    """Decimals of the answer, to which the column's numbers are rounded. null: those of the column."""
    tolerance: float = 0.01
    """Largest relative error of a right answer, at least 0 and less than 1."""
    decimal_mark: Literal[".", ","] = "."
    """Decimal mark in the column; the other one separates thousands. The model answers with a point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Roles:
    user: tuple[str, ...] = ("user", "human")
    """Names of the user's role in the data."""
    assistant: tuple[str, ...] = ("assistant", "gpt")
    """Names of the model's role in the data."""
    system: tuple[str, ...] = ("system", "developer")
    """Names of the system message's role in the data."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskFile:
    name: str
    """Name of the task in all commands: a to z, 0 to 9 and _, first a letter; not that of a built-in task."""
    kind: Kind
    """`choice`: one of the labels. `yes_no`: one of two. `multi`: a Yes/No question for each label. `number`: a number from the
    text. `text`: free text. `chat`: a conversation."""
    title: str = ""
    """Short description, one line."""
    licence: str = "not stated"
    """Licence of the data."""
    source: Source = dataclasses.field(default_factory=Source)
    preset: Preset | None = None
    """Tool or data format whose rows are converted to `columns`. null: the table has these columns."""
    columns: Columns = dataclasses.field(default_factory=Columns)
    labels: tuple[Label, ...] = ()
    """Labels, in the order in which prompt and tables list them; at a tie the first one wins."""
    unlabelled: Literal["error", "skip"] = "error"
    """Treatment of a row without a declared label: `skip` leaves it out and counts it."""
    textless: Literal["error", "skip"] = "error"
    """Treatment of a row whose `columns.text` is empty: `skip` leaves it out and counts it."""
    separator: str = "|"
    """Kind multi: text between two labels."""
    time_format: str | None = None
    """Format of `columns.time`, such as %d/%m/%Y. null: ISO 8601, such as 2024-12-31, with or without a time of day."""
    number: Number = dataclasses.field(default_factory=Number)
    roles: Roles = dataclasses.field(default_factory=Roles)
    train_on: Literal["last", "all_assistant"] = "last"
    """Kind chat: the assistant's messages to train on; `all_assistant` makes an example of each."""
    prompt: Prompt = dataclasses.field(default_factory=Prompt)
    split: Split = dataclasses.field(default_factory=Split)

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed answers of one question; empty: free text."""
        if self.kind == "multi":
            return YES_NO
        return tuple(label.value for label in self.labels) if self.kind in ("choice", "yes_no") else ()

    @property
    def segment_names(self) -> tuple[str, ...]:
        """Names of an example's segments: `columns.segments`, and for kind multi the label asked about."""
        return (*self.columns.segments, self.columns.labels) if self.kind == "multi" else self.columns.segments

    @property
    def is_chat(self) -> bool:
        return self.kind == "chat"

    @property
    def split_by(self) -> str:
        """`split.by` with its default filled in."""
        return self.split.by or ("files" if self.source.train or self.source.test else "share")


def to_tree(task: TaskFile) -> dict[str, Any]:
    """Return the keys and defaults as dicts, lists and scalars, from which `task_file_from_tree` builds an equal record."""
    return _plain(dataclasses.asdict(task))  # type: ignore[no-any-return]


def render_card(task: TaskFile) -> str:
    """Return the task file's card: YAML with the defaults filled in, part of prepared data and adapters."""
    return yaml.safe_dump(to_tree(task), sort_keys=False, allow_unicode=True)


def hash_question(task: TaskFile) -> str:
    """Return the SHA-256, in 64 hex digits, of what a model is asked and may answer.

    It does not cover the rows' source, their split and the column's names for a label.
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
