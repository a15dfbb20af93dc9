"""First task file of a table: what its columns hold, with every guess marked as one."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

from finlora.data.taskfile.items import read_time
from finlora.data.taskfile.own_tables import as_text, read_table
from finlora.data.taskfile.record import Kind, Preset
from finlora.errors import ConfigError, DatasetError, counted

_GUESS = "guess: "
_MAX_LABELS = 100
_HINTS = {
    "label": "label|labels|class|category|categories|sentiment|tone|target|topic|topics|tag|tags|intent|rating|is_.*|"
    "department|team|queue|reason|priority|urgency",
    "id": "id|uuid|key|number|no|nr|ref|reference|.*_(id|number|no|nr|ref)",
    "group": "customer.*|client.*|account.*|company|issuer|ticker|filing|doc.*|user.*|thread.*|author",
    "time": ".*date.*|.*time.*|received|created.*|published.*|day|month",
    "weight": "weight|sample_weight|w",
    "question": "question|query|ask",
    "answer": "answer|value|completion|output|response|reply|target|figure|amount",
    "text": "text|document|body|content|message|sentence|headline|prompt|fragment|letter|tweet|post|news",
}
_DAY = re.compile(r"\s*(\d{1,2})([./-])(\d{1,2})\2(\d{4}|\d{2})\s*$")
_NUMBER = re.compile(r"[-\u2212]?[\d., ]*\d")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """Content of a column."""

    name: str
    values: Sequence[str]
    """All but missing and empty ones."""
    counts: Counter[str]
    num_rows: int

    @property
    def mean_length(self) -> float:
        return mean(map(len, self.values)) if self.values else 0.0

    @property
    def is_unique(self) -> bool:
        return len(self.counts) == self.num_rows

    @property
    def is_number(self) -> bool:
        return bool(self.values) and all(_NUMBER.fullmatch(value) for value in self.counts)

    @property
    def has_few_values(self) -> bool:
        return 2 <= len(self.counts) <= min(_MAX_LABELS, max(2, self.num_rows // 4))

    @property
    def is_label(self) -> bool:
        return self.has_few_values and self.mean_length < 40

    def has_name(self, kind: str) -> bool:
        return re.fullmatch(_HINTS[kind], self.name.strip().lower().replace(" ", "_")) is not None


@dataclass(kw_only=True, slots=True)
class FirstFile:
    """Lines of a task file, and the guesses in it."""

    lines: list[str] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)

    def add(self, line: str, comment: str = "") -> None:
        self.lines.append(f"{line}  # {comment}" if comment else line)
        if comment.startswith(_GUESS):
            key = line.strip().removeprefix("- {value: ").partition(":")[0].partition(",")[0]
            self.guesses.append(f"{key}: {comment.removeprefix(_GUESS)}")

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"


def write_first_file(table: Path, folder: Path, taken: Sequence[str], label: str | None = None) -> FirstFile:
    """Return the first task file of a table.

    Args:
        folder: of the task file; the table's path is relative to it.
        taken: names of other tasks.
        label: column of the labels. None: it is guessed.

    Raises:
        ConfigError: `label` is not a column of the table, or of an export that names its own.
        DatasetError: the table cannot be read, or has nothing to learn: no text column, or no labels and no answers.
    """
    rows = [fields for fields, _ in read_table(table)]
    file = FirstFile()
    file.add(
        f"# First task file for {table.name}: {counted(len(rows), 'row')}. Look at each line with `guess` and correct it."
    )
    name = re.sub(r"[^a-z0-9]+", "_", table.stem.lower()).strip("_") or "task"
    name = name if name[0].isalpha() else f"t_{name}"
    name = f"{name[:60]}_own" if name in taken else name[:60]
    file.add(f"name: {name}")
    file.add(f"title: {_quote(table.stem)}", _GUESS + "the file's name")
    file.add('licence: "not stated"', "say whose data this is")
    path = table.absolute()
    source = path.relative_to(folder.absolute()) if path.is_relative_to(folder.absolute()) else path
    preset = _find_preset(rows[0])
    columns = [] if preset is not None else list(dict.fromkeys(key for row in rows[:100] for key in row))
    if label is not None:
        _require_label(label, columns, table.name, rows)
    if preset is not None:
        _describe_preset(file, preset, rows, str(source))
    else:
        _describe_columns(file, table, rows, str(source), label)
    return file


def _require_label(name: str, columns: Sequence[str], table: str, rows: Sequence[Mapping[str, Any]]) -> None:
    if name not in columns:
        there = (
            f"found {', '.join(columns)}"
            if columns
            else "it is a tool's export, whose preset says where the labels are"
        )
        raise ConfigError(f"--label {name}: {table} has no such column: {there}.")
    if not 2 <= (number := len(_look_at(name, rows).counts)) <= _MAX_LABELS:
        raise ConfigError(
            f"--label {name}: found {counted(number, 'value')} in {table}, expected 2 to {_MAX_LABELS} labels."
        )


def _find_preset(row: Mapping[str, Any]) -> Preset | None:
    """Return the tool whose exports have the row's keys."""
    if isinstance(row.get("conversations"), list):
        return "sharegpt"
    if isinstance(row.get("messages"), list):
        return "openai"
    if "annotations" in row and isinstance(row.get("data"), Mapping):
        return "label_studio"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if isinstance(row.get("responses"), Mapping) and isinstance(row.get("fields"), Mapping):
        return "argilla"
    if "_task_hash" in row or ("text" in row and row.get("answer") in ("accept", "reject", "ignore")):
        return "prodigy"
    if "text" in row and (isinstance(row.get("label"), list) or isinstance(row.get("labels"), list)):
        return "doccano"
    return None


def _describe_preset(file: FirstFile, preset: Preset, rows: Sequence[Mapping[str, Any]], source: str) -> None:
    kind: Kind = "chat" if preset in ("sharegpt", "openai") else "text" if preset == "alpaca" else "choice"
    labels = Counter(_list_preset_labels(preset, rows)) if kind == "choice" else Counter()
    if kind == "choice" and any(len(set(found)) > 1 for found in _label_sets(preset, rows)):
        kind = "multi"
    file.add(f"kind: {kind}", _GUESS + f"usual in exports of {preset}")
    file.add(f"source: {{files: {_quote(source)}}}")
    file.add(f"preset: {preset}", _GUESS + f"its keys are {', '.join(list(rows[0])[:6])}")
    if columns := _name_export_columns(rows[0], kind):
        pairs = ", ".join(f"{key}: {_quote(name)}" for key, name in columns.items())
        file.add(f"columns: {{{pairs}}}", _GUESS + "names inside the export")
    if kind in ("choice", "multi"):
        if len(labels) < 2:
            raise DatasetError(
                f"{source}: found {counted(len(labels), 'label')} in this export of {preset}, expected at least two."
            )
        _add_labels(file, labels)
        if kind == "choice":
            file.add('prompt: {instruction: "Which label fits this text?"}', _GUESS + "write the question")
    file.add("split: {by: share, test_share: 0.2, seed: 1}", _GUESS + "a fifth of the rows is the test")


def _name_export_columns(row: Mapping[str, Any], kind: Kind) -> dict[str, str]:
    """Return the columns of a Label Studio or Argilla export that are not called text and label."""
    inner, answers = row.get("data", row.get("fields")), row.get("responses")
    found: dict[str, str] = {}
    if isinstance(inner, Mapping) and "text" not in inner:
        texts = {name: value for name, value in inner.items() if isinstance(value, str)}
        if texts:
            found["text"] = max(texts, key=lambda name: len(texts[name]))
    key = "labels" if kind == "multi" else "label"
    if isinstance(answers, Mapping) and answers and key not in answers:
        found[key] = next(iter(answers))
    return found


def _label_sets(preset: Preset, rows: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        found: list[Any] = []
        if preset == "label_studio":
            for item in row["annotations"]:
                for result in item.get("result", ()):
                    found += (result.get("value") or {}).get("choices", ())
        elif preset == "argilla":
            for answers in row["responses"].values():
                found += [answer.get("value") for answer in answers][:1]
        else:
            raw = row.get("accept") or row.get("labels") or row.get("label") or []
            found = raw if isinstance(raw, list) else [raw]
        yield [str(label) for label in found if label is not None and not isinstance(label, list | Mapping)]


def _list_preset_labels(preset: Preset, rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for found in _label_sets(preset, rows):
        yield from found


def _describe_columns(
    file: FirstFile, table: Path, rows: Sequence[Mapping[str, Any]], source: str, wanted: str | None
) -> None:
    columns = {name: _look_at(name, rows) for name in dict.fromkeys(key for row in rows[:100] for key in row)}
    left = dict(columns)

    def take(column: _Column | None) -> _Column | None:
        return left.pop(column.name) if column is not None else None

    text = take(_find_text({name: column for name, column in columns.items() if name != wanted}))
    if text is None:
        raise DatasetError(f"{table.name}: no column holds texts: found {', '.join(columns)}.")
    question = take(_first(left, "question", lambda column: not column.is_number))
    label = left[wanted] if wanted else _first(left, "label", lambda column: column.has_few_values)
    answer = None if wanted else _first(left, "answer", lambda column: not column.has_few_values)
    is_hinted = label is not None
    if label is None and answer is None:
        label = next((column for column in left.values() if column.is_label), None)
    take(label if label is not None else answer)
    others = (
        [] if wanted or is_hinted else [f"{each.name} ({len(each.counts)})" for each in left.values() if each.is_label]
    )
    separator = None if label is None else _find_separator(label)
    kind = _choose_kind(label, answer, question, separator)
    if kind is None:
        raise DatasetError(
            f"{table.name}: found {', '.join(columns)}; no column holds labels (2 to {_MAX_LABELS} values) or answers. Name one "
            "in a task file of your own."
        )
    id_ = take(_first(left, "id", lambda column: column.is_unique))
    time, form = _find_time(left)
    take(time)
    group = take(_first(left, "group", lambda column: not column.is_unique))
    weight = take(_first(left, "weight", lambda column: column.is_number))
    segments = [column.name for column in left.values() if column.has_few_values and len(column.counts) <= 20]
    file.add(f"kind: {kind}", _GUESS + _explain_kind(kind, label, answer))
    file.add(f"source: {{files: {_quote(source)}}}")
    file.add("columns:")
    file.add(
        f"  text: {_quote(text.name)}", _GUESS + f"the longest texts, {text.mean_length:,.0f} characters on average"
    )
    named = {
        "question": question,
        {"multi": "labels", "choice": "label", "yes_no": "label"}.get(kind, "answer"): label or answer,
    }
    for key, column in {**named, "id": id_, "group": group, "time": time, "weight": weight}.items():
        if column is not None:
            comment = f"{len(column.counts):,} values, such as {_quote(column.values[0][:40])}"
            if column is label and others:
                comment += f"; or is it {', '.join(others[:5])}? Then: --label NAME --overwrite"
            file.add(f"  {key}: {_quote(column.name)}", comment if column is label and wanted else _GUESS + comment)
    if segments:
        file.add(f"  segments: [{', '.join(map(_quote, segments))}]", _GUESS + "each value also gets its own score")
    if form is not None:
        file.add(f"time_format: {_quote(form)}", "found: no other order of day and month fits all rows")
    if separator is not None:
        file.add(f"separator: {_quote(separator)}", _GUESS + "it stands between labels")
    if num_empty := len(rows) - len(text.values):
        file.add("textless: skip", _GUESS + f"{counted(num_empty, 'row')} without a text, left out")
    if label is not None:
        counts = label.counts
        if separator is not None:
            counts = Counter(part for value in label.values for part in value.split(separator))
        _add_labels(file, counts)
        num_empty = len(rows) - len(label.values)
        if num_empty and kind != "multi":
            file.add("unlabelled: skip", _GUESS + f"{counted(num_empty, 'row')} without a label, left out")
    _add_prompt(file, kind, label, answer, question)
    _add_split(file, time, form, group)


def _look_at(name: str, rows: Sequence[Mapping[str, Any]]) -> _Column:
    values = []
    for row in rows:
        value = row.get(name)
        if not isinstance(value, list | tuple | Mapping) and (text := as_text(value)) and text.strip():
            values.append(text)
    return _Column(name=name, values=values, counts=Counter(values), num_rows=len(rows))


def _find_text(columns: Mapping[str, _Column]) -> _Column | None:
    texts = [column for column in columns.values() if not column.is_number and column.mean_length >= 8]
    named = [column for column in texts if column.has_name("text")]
    return max(named or texts, key=lambda column: column.mean_length, default=None)


def _first(columns: Mapping[str, _Column], kind: str, fits: Any) -> _Column | None:
    return next(
        (column for column in columns.values() if column.has_name(kind) and column.values and fits(column)), None
    )


def _find_separator(label: _Column) -> str | None:
    if label.name.lower() in ("labels", "topics", "tags", "categories"):
        return next((sign for sign in "|;," if any(sign in value for value in label.counts)), None)
    return "|" if sum("|" in value for value in label.values) * 10 > len(label.values) else None


def _choose_kind(
    label: _Column | None, answer: _Column | None, question: _Column | None, separator: str | None
) -> Kind | None:
    if label is not None:
        if separator is not None:
            return "multi"
        return "yes_no" if question is not None and len(label.counts) == 2 else "choice"
    if answer is None:
        return None
    return "number" if answer.is_number else "text"


def _explain_kind(kind: Kind, label: _Column | None, answer: _Column | None) -> str:
    if label is not None:
        return f"{label.name} has {len(label.counts)} values"
    return f"{answer.name if answer else ''} holds {'numbers' if kind == 'number' else 'texts'}"


def _find_time(columns: Mapping[str, _Column]) -> tuple[_Column | None, str | None]:
    """Return a column of times and its format, None for ISO 8601. A column in which day or month could come first is skipped."""
    for column in columns.values():
        if not column.has_name("time") or len(column.values) < column.num_rows:
            continue
        days = [_DAY.match(value) for value in column.counts]
        if all(days):
            firsts, seconds = (max(int(day[n]) for day in days if day) for n in (1, 3))
            day = days[0]
            if day is not None and (firsts > 12) != (seconds > 12):
                sign, year = day[2], "%Y" if len(day[4]) == 4 else "%y"
                return column, (f"%d{sign}%m{sign}{year}" if firsts > 12 else f"%m{sign}%d{sign}{year}")
            continue
        try:
            for value in column.counts:
                read_time(value, None, "", "")
        except DatasetError:
            continue
        return column, None
    return None, None


def _add_labels(file: FirstFile, counts: Mapping[str, int]) -> None:
    file.add("labels:", "found; in the order of the prompt; `value` is what the model answers")
    spellings: dict[str, list[str]] = {}
    for raw in sorted(counts, key=lambda raw: (-counts[raw], raw)):  # the most frequent spelling names the label
        spellings.setdefault(raw.strip().casefold(), []).append(raw)
    for raws in sorted(spellings.values(), key=lambda raws: raws[0].strip()):
        value = raws[0].strip()
        is_code = not re.search(r"[^\W\d_]{2}", value)
        named = raws if is_code else [raw for raw in raws if raw != value]
        from_ = f", from: [{', '.join(map(_quote, named))}]" if named else ""
        comment = f"{sum(counts[raw] for raw in raws):,} rows"
        if len(raws) > 1:
            comment = f"{_GUESS}{len(raws)} spellings of one label; {comment}"
        file.add(
            f"  - {{value: {_quote(value)}{from_}}}",
            f"{_GUESS}a code? Name it in words; {comment.removeprefix(_GUESS)}" if is_code else comment,
        )


def _add_prompt(
    file: FirstFile, kind: Kind, label: _Column | None, answer: _Column | None, question: _Column | None
) -> None:
    if question is not None or kind == "text":
        return
    words = (label or answer).name.replace("_", " ") if (label or answer) else "label"  # type: ignore[union-attr]
    asked = "Is this text about {label}?" if kind == "multi" else f"What is the {words} of this text?"
    file.add("prompt:")
    file.add(f"  instruction: {_quote(asked)}", _GUESS + "write the question as a colleague would ask it")


def _add_split(file: FirstFile, time: _Column | None, form: str | None, group: _Column | None) -> None:
    if time is not None:
        days = sorted(read_time(value, form, "", "").date().isoformat() for value in time.values)
        later = days[int(0.8 * (len(days) - 1))]
        if later > days[0]:
            keep = ", keep_together: group" if group is not None else ""
            file.add(
                f'split: {{by: time, test_from: "{later}"{keep}}}', _GUESS + "the latest fifth of the rows is the test"
            )
            return
    if group is not None:
        file.add("split: {by: group, test_share: 0.2, seed: 1}", _GUESS + f"no {group.name} is in both train and test")
        return
    file.add("split: {by: share, test_share: 0.2, seed: 1}", _GUESS + "a fifth of the rows is the test")


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
