"""Answers of an evaluation, one row a test example, as a Parquet file beside the results: what a model card is computed from.

The rows hold no text of the test set: labels, probabilities, lengths, dates and numbers of groups. The file's SHA-256 is in the
Result, so that a table and its scores belong together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from finlora.data.example import Example
from finlora.durable import hash_file
from finlora.errors import ResultError

_MAX_BYTES = 2**28


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerTable:
    """Columns of the answers, in the order of the test split."""

    id: list[str]
    label: list[str | None]
    """True label. None: the example is free text."""
    answer: list[str | None]
    """Chosen label, or the generated text of a question with labels. None: free text."""
    is_right: list[bool]
    """Whether it counts for `accuracy`."""
    probability: list[float | None]
    """Probability of the chosen label. None: the answer was generated."""
    chars: list[int]
    """Characters of the prompt."""
    group: list[int]
    """Number of the example's group, by which intervals are clustered."""
    time: list[str]
    """Date or time of the raw row; empty: not known."""

    @property
    def groups(self) -> list[str]:
        """Groups as `intervals.py` takes them."""
        return [str(number) for number in self.group]

    def __len__(self) -> int:
        return len(self.id)


def make_answer_table(
    answers: Sequence[str], examples: Sequence[Example], is_right: Sequence[bool], confidences: Mapping[int, float]
) -> AnswerTable:
    """Return the table of one evaluation.

    Args:
        confidences: index of an example with label scoring -> probability of the chosen label.
    """
    numbers: dict[str, int] = {}
    return AnswerTable(
        id=[example.id for example in examples],
        label=[example.label if example.choices else None for example in examples],
        answer=[answer if example.choices else None for answer, example in zip(answers, examples, strict=True)],
        is_right=list(is_right),
        probability=[confidences.get(index) for index in range(len(examples))],
        chars=[len(example.prompt) for example in examples],
        group=[numbers.setdefault(example.group, len(numbers)) for example in examples],
        time=[example.time for example in examples],
    )


def write_answer_table(table: AnswerTable, path: Path) -> str:
    """Write a table atomically; returns the SHA-256 of the file in hex.

    Raises:
        OSError: as on a full disk; an older file is left.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"is_right": pa.bool_(), "probability": pa.float64(), "chars": pa.int64(), "group": pa.int64()}
    schema = pa.schema([(field.name, kinds.get(field.name, pa.string())) for field in fields(AnswerTable)])
    columns = {name: getattr(table, name) for name in schema.names}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    try:
        pq.write_table(pa.table(columns, schema=schema), temporary, compression="zstd")
        digest = hash_file(temporary)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return digest


def read_answer_table(path: Path, digest: str) -> AnswerTable:
    """Read a table and compare its hash.

    Args:
        digest: SHA-256 in hex, from the Result.

    Raises:
        ResultError: it is missing, was changed, or is not a table of answers.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    again = "Run `finlora evaluate` again."
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ResultError(f"{path} has more than {_MAX_BYTES:,} bytes: it is not a table of answers. {again}")
        found = hash_file(path)
        if found != digest:
            raise ResultError(
                f"{path} was changed after its evaluation: its SHA-256 is {found[:12]}, expected {digest[:12]}. {again}"
            )
        columns = pq.read_table(path).to_pydict()
        return AnswerTable(**{field.name: columns[field.name] for field in fields(AnswerTable)})
    except (OSError, pa.ArrowException, KeyError) as error:
        raise ResultError(f"{path} cannot be read as a table of answers ({error}). {again}") from error
