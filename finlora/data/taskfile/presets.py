"""Readers of annotation tools' exports and of instruction sets: each row gets the columns that the task file names.

Formats, as their makers publish them: Label Studio (labelstud.io/guide/export#JSON), Prodigy (prodi.gy/docs/api-interfaces),
doccano (github.com/doccano/doccano, backend/data_export), Argilla 2 (docs.argilla.io, `Records.to_dict`), alpaca
(github.com/tatsu-lab/stanford_alpaca), sharegpt and OpenAI (`messages`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from finlora.data.prompts import completion
from finlora.data.taskfile.own_tables import TableRow, get
from finlora.data.taskfile.record import Preset, TaskFile
from finlora.errors import DatasetError


class Applied(NamedTuple):
    """Rows with a value for each column that `columns` names."""

    rows: list[TableRow]
    notes: list[str]
    """How many rows were left out and why, a sentence for each reason."""


def apply_preset(task: TaskFile, rows: Sequence[TableRow]) -> Applied:
    """Return the rows with the export's text and labels under the names of the task's columns.

    Raises:
        DatasetError: a row lacks keys of the preset; lists those it has.
    """
    if task.preset is None or task.preset in ("sharegpt", "openai"):
        return Applied(list(rows), [])
    found: list[TableRow] = []
    skipped: Counter[str] = Counter()
    for row in rows:
        added = _READERS[task.preset](row, task)
        if isinstance(added, str):
            skipped[added] += 1
        else:
            found.append(row._replace(fields={**row.fields, **_with_labels(added, task)}))
    notes = [f"Left out {count:,} of {len(rows):,} rows of {task.preset}: {why}." for why, count in skipped.items()]
    if not found:
        raise DatasetError(f"no row of preset {task.preset} is left. {' '.join(notes)}")
    return Applied(found, notes)


def _with_labels(added: dict[str, Any], task: TaskFile) -> dict[str, Any]:
    labels = added.pop("labels", None)
    if labels is None:
        return added
    if task.kind == "multi":
        return {**added, task.columns.labels: labels}
    return {**added, task.columns.label: labels[0] if len(labels) == 1 else (" + ".join(labels) or None)}


def _read_alpaca(row: TableRow, task: TaskFile) -> dict[str, Any] | str:
    _require(row, "alpaca", "instruction", "output")
    instruction, given = row.fields["instruction"], row.fields.get("input") or ""
    prompt = completion(instruction, given) if given else f"Instruction: {instruction}\nAnswer: "
    return {task.columns.text: prompt, task.columns.answer: row.fields["output"]}


def _read_label_studio(row: TableRow, task: TaskFile) -> dict[str, Any] | str:
    _require(row, "label_studio", "data", "annotations")
    kept = [item for item in _objects(row.fields["annotations"]) if not item.get("was_cancelled")]
    if not kept:
        return "no annotation, or only cancelled ones"
    names = [
        tuple(
            str(choice)
            for result in _objects(item.get("result"))
            for choice in _list(get(result, "value.choices") or get(result, "value.taxonomy"))
        )
        for item in kept
    ]
    text = get(row.fields["data"], task.columns.text) if isinstance(row.fields["data"], Mapping) else None
    return _agree(names, {task.columns.text: text if text is not None else get(row.fields, task.columns.text)})


def _read_prodigy(row: TableRow, task: TaskFile) -> dict[str, Any] | str:
    _require(row, "prodigy", "text")
    answer = row.fields.get("answer", "accept")
    if answer != "accept":
        return f"answer is {answer}"
    chosen = row.fields.get("accept")
    labels = [str(item) for item in _list(chosen if chosen is not None else row.fields.get("label"))]
    return {task.columns.text: row.fields["text"], "labels": labels}


def _read_doccano(row: TableRow, task: TaskFile) -> dict[str, Any] | str:
    name = "labels" if "labels" in row.fields else "label"
    _require(row, "doccano", name)
    text = row.fields.get(task.columns.text, row.fields.get("text", row.fields.get("data")))
    return {task.columns.text: text, "labels": [str(item) for item in _list(row.fields[name])]}


def _read_argilla(row: TableRow, task: TaskFile) -> dict[str, Any] | str:
    """Read a record as nested (`responses: {question: [{value, status}]}`) or flat (`question.responses`) JSON."""
    fields, columns = row.fields, task.columns
    question = columns.labels if task.kind == "multi" else columns.label
    responses = fields.get("responses")
    if isinstance(responses, Mapping):
        own = responses.get(question, next(iter(responses.values()), []) if len(responses) == 1 else [])
        pairs = [(item.get("value"), item.get("status", "submitted")) for item in _objects(own)]
    elif f"{question}.responses" in fields:
        values = _list(fields[f"{question}.responses"])
        states = _list(fields.get(f"{question}.responses.status")) or ["submitted"] * len(values)
        pairs = list(zip(values, states, strict=False))
    else:
        _require(row, "argilla", "responses")
        return "no response"
    kept = [tuple(map(str, _list(value))) for value, status in pairs if status == "submitted" and value is not None]
    if not kept:
        return "no submitted response"
    inner = fields.get("fields")
    text = get(inner, columns.text) if isinstance(inner, Mapping) else get(fields, columns.text)
    return _agree(kept, {columns.text: text})


def _agree(answers: Sequence[tuple[str, ...]], others: dict[str, Any]) -> dict[str, Any] | str:
    """Return the most frequent answer of the annotators with the other columns; at a tie, why the row is left out."""
    ranked = Counter(answers).most_common(2)
    if len(ranked) == 2 and ranked[0][1] == ranked[1][1]:
        return "its annotators disagree"
    return {**others, "labels": list(ranked[0][0])}


def _require(row: TableRow, preset: str, *names: str) -> None:
    missing = [name for name in names if name not in row.fields]
    if missing:
        raise DatasetError(
            f"{row.source}: found {', '.join(list(row.fields)[:20])}; preset {preset} needs {' and '.join(missing)}. Correct "
            "`preset`, or leave it out and name the columns."
        )


def _objects(value: Any) -> Iterable[Mapping[str, Any]]:
    return [item for item in _list(value) if isinstance(item, Mapping)]


def _list(value: Any) -> list[Any]:
    if value is None or value == "":
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


_READERS: dict[Preset, Callable[[TableRow, TaskFile], dict[str, Any] | str]] = {
    "alpaca": _read_alpaca,
    "label_studio": _read_label_studio,
    "prodigy": _read_prodigy,
    "doccano": _read_doccano,
    "argilla": _read_argilla,
}
