"""Reader of task files: YAML to the typed record, with every unknown key, wrong type and contradiction in one error.

The keys are read by configfile.py, as run settings are, and not by pydantic: it also suggests similar keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from finlora.config import is_date
from finlora.configfile import settings_from_tree, show
from finlora.data.taskfile.record import CHAT_PRESETS, MAX_LABELS, YES_NO, TaskFile
from finlora.errors import ConfigError
from finlora.yamltext import parse_yaml, read_yaml

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_YAML_BOOLEANS = "YAML reads Yes, No, on, off, true and false without quotes as true or false"


def load_task_file(path: Path) -> TaskFile:
    """Read a task file.

    Raises:
        ConfigError: it cannot be read; or it has unknown keys, wrong types or contradictions, all listed in one error.
    """
    try:
        tree = read_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"task file {path} does not exist: `finlora new-task DATA` writes a first one.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"task file {path} cannot be read ({error}): expected a UTF-8 YAML file.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"task file {path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"task file {path} holds {show(tree)}: expected keys like `name:`, `kind:` and `source:`.")
    try:
        return task_file_from_tree(tree)
    except ConfigError as error:
        raise ConfigError([f"task file {path.name}: {fault}" for fault in error.faults]) from error


def task_file_from_tree(tree: Mapping[str, Any]) -> TaskFile:
    """Build a task file from the dicts and lists of its YAML.

    Raises:
        ConfigError: as `load_task_file`.
    """
    faults: list[str] = []
    values = _normalise(dict(tree), faults)
    try:
        built = settings_from_tree(TaskFile, values)
    except ConfigError as error:
        raise ConfigError([*faults, *error.faults]) from error
    faults += [message for is_good, message in _list_checks(built) if not is_good]
    if faults:
        raise ConfigError(faults)
    return built


def read_card(card: str) -> TaskFile:
    """Return the task file of a card (see `render_card`).

    Raises:
        ConfigError: it is not a card.
    """
    try:
        tree = parse_yaml(card)
    except yaml.YAMLError as error:
        raise ConfigError(f"a task's card is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"a task's card holds {show(tree)}")
    return task_file_from_tree(tree)


def _normalise(tree: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """Return a tree with the short forms written out: `labels: ["a", "b"]`, `files: {train: , test: }`, numbers in `from`."""
    files = tree["source"].get("files") if isinstance(tree.get("source"), Mapping) else None
    if isinstance(files, Mapping):
        tree["source"] = {**{key: value for key, value in tree["source"].items() if key != "files"}, **files}
    if tree.get("kind") == "yes_no" and not tree.get("labels"):
        tree["labels"] = list(YES_NO)
    if tree.get("preset") in CHAT_PRESETS and isinstance(tree.get("columns", {}), Mapping):
        column = "conversations" if tree["preset"] == "sharegpt" else "messages"
        tree["columns"] = {"messages": column, **tree.get("columns", {})}
    if isinstance(tree.get("labels"), list):
        tree["labels"] = [
            _normalise_label(label, f"labels[{index}]", faults) for index, label in enumerate(tree["labels"])
        ]
    return tree


def _normalise_label(label: Any, name: str, faults: list[str]) -> Any:
    if not isinstance(label, Mapping):
        return {"value": _as_text(label, name, faults)}
    found = dict(label)
    if "value" in found:
        found["value"] = _as_text(found["value"], f"{name}.value", faults)
    if "from" in found:
        raw = found["from"] if isinstance(found["from"], list) else [found["from"]]
        found["from"] = [_as_text(item, f"{name}.from[{index}]", faults) for index, item in enumerate(raw)]
    return found


def _as_text(value: Any, name: str, faults: list[str]) -> Any:
    """Return a number as its text; report true, false and null, which YAML made of unquoted words."""
    if isinstance(value, bool):
        written = "Yes" if value else "No"
        faults.append(
            f'{name} is {str(value).lower()}, not a text: {_YAML_BOOLEANS}. Write "{written}" in quotes, as the data has it.'
        )
        return "?" + name  # unique and not empty, so that no other check reports the same value again
    if value is None:
        faults.append(f'{name} is null, not a text: write "null" or "" in quotes if the data has that.')
        return "?" + name
    return str(value) if isinstance(value, int | float) else value


def _list_checks(task: TaskFile) -> list[tuple[bool, str]]:
    """Return the conditions on the keys, each with the error message if it does not hold."""
    values = [label.value for label in task.labels]
    sources = [text for label in task.labels for text in dict.fromkeys((label.value, *label.from_))]
    repeated = sorted({text for text in sources if sources.count(text) > 1})
    with_labels = task.kind in ("choice", "yes_no", "multi")
    files = [task.source.files, task.source.train or task.source.test, task.source.hub]
    checks = [
        (
            bool(_NAME.fullmatch(task.name)),
            f"name={show(task.name)}: expected a to z, 0 to 9 and _, first a letter, at most 64 of them",
        ),
        (
            sum(map(bool, files)) == 1,
            "source: expected one of `files`, `train` with `test`, or `hub`, for example `source: {files: letters.csv}`",
        ),
        (
            bool(task.source.train) == bool(task.source.test),
            "source names only one of `train` and `test`: expected both, or `files` and a split",
        ),
        (
            not task.source.hub or bool(_COMMIT.fullmatch(task.source.revision or "")),
            f"source.revision={show(task.source.revision)}: expected the commit of the hub dataset, 40 hex digits, since a "
            "branch or tag can move to other rows",
        ),
        (bool(task.source.hub) or task.source.revision is None, "source.revision is only for `hub`: leave it out"),
        (
            not with_labels or len(values) >= (1 if task.kind == "multi" else 2),
            f"labels holds {len(values)}: expected at least two for kind {task.kind}; `finlora new-task DATA` lists a file's",
        ),
        (len(values) <= MAX_LABELS, f"labels holds {len(values):,}: expected at most {MAX_LABELS:,}"),
        (task.kind != "yes_no" or len(values) == 2, f"labels holds {len(values)}: expected two for kind yes_no"),
        (with_labels or not values, f"labels has no effect for kind {task.kind}: leave it out"),
        (not repeated, f"labels: {', '.join(map(show, repeated))} stands for more than one label: write it once"),
        (
            all(value.strip() == value and value for value in values),
            "labels: a value is empty or has white space at its start or end: put what the data has under `from`",
        ),
        (
            all(text.isprintable() for text in (*values, task.title, task.licence)),
            "title, licence and labels are shown in tables: expected no line breaks and control characters in them",
        ),
        (task.separator != "", 'separator is empty: expected the text between two labels, such as "|"'),
        (
            (task.preset in CHAT_PRESETS) <= task.is_chat,
            f"preset {task.preset} needs kind chat, found kind {task.kind}",
        ),
        (
            task.preset != "alpaca" or task.kind == "text",
            f"preset alpaca needs kind text, found kind {task.kind}",
        ),
        (
            task.preset not in ("label_studio", "prodigy", "doccano", "argilla") or task.kind in ("choice", "multi"),
            f"preset {task.preset} needs kind choice or multi, found kind {task.kind}",
        ),
        (
            task.kind in ("multi", "text", "chat") or bool(task.prompt.instruction or task.columns.question),
            f"prompt.instruction is missing: expected the question to each text, as prompt: {{instruction: "
            f'"What is the tone of this letter?"}}{"" if task.kind == "choice" else ", or columns.question"}',
        ),
        (
            task.columns.question is None or task.kind in ("yes_no", "number"),
            f"columns.question is for kinds yes_no and number, found kind {task.kind}: leave it out",
        ),
        (
            task.prompt.example is None or not task.choices or task.prompt.example.label in task.choices,
            f"prompt.example.label={show(task.prompt.example and task.prompt.example.label)}: expected one of "
            f"{', '.join(task.choices[:20])}",
        ),
        (
            task.prompt.example is None or not task.is_chat,
            "prompt.example has no effect for kind chat: put the example into prompt.system",
        ),
        (
            task.prompt.example is None or bool(task.prompt.example.question) == (task.columns.question is not None),
            "prompt.example.question: expected one where, and only where, columns.question is set",
        ),
        (0 <= task.number.tolerance < 1, f"number.tolerance={task.number.tolerance}: expected 0 <= tolerance < 1"),
        (
            task.number.decimals is None or 0 <= task.number.decimals <= 20,
            f"number.decimals={task.number.decimals}: expected 0 to 20",
        ),
    ]
    return checks + _list_split_checks(task)


def _list_split_checks(task: TaskFile) -> list[tuple[bool, str]]:
    split, by, columns = task.split, task.split_by, task.columns
    is_parted = bool(task.source.train)
    return [
        (0 < split.test_share < 1, f"split.test_share={split.test_share}: expected more than 0 and less than 1"),
        (split.seed >= 0, f"split.seed={split.seed}: expected at least 0"),
        (split.gap_days >= 0, f"split.gap_days={split.gap_days}: expected at least 0"),
        (
            by != "time" or (columns.time is not None and split.test_from is not None),
            'split by time: expected columns.time and split.test_from, such as test_from: "2025-01-01"',
        ),
        (
            split.test_from is None or is_date(split.test_from),
            f"split.test_from={show(split.test_from)}: expected a date such as 2025-01-01",
        ),
        (by != "group" or columns.group is not None, "split by group: expected columns.group"),
        (
            split.keep_together is None or (by == "time" and columns.group is not None),
            "split.keep_together=group: expected a split by time, and columns.group",
        ),
        (
            by != "column" or split.column is not None,
            "split by column: expected split.column, which holds train or test",
        ),
        (
            by != "files" or is_parted or bool(task.source.hub),
            "split by files: expected source: {train: FILE, test: FILE}, or a hub dataset with splits train and test",
        ),
        (
            not is_parted or by == "files",
            f"source names train and test, but split.by={by}: leave split out, or give both files as `files`",
        ),
    ]
