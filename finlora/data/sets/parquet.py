"""Parquet file of a prepared split: columns, metadata, and a reader for untrusted files.

A dictionary-encoded text or a compressed page can expand a thousandfold: the reader stops beyond the sizes that FinLoRA
writes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from finlora.data.example import Example
from finlora.durable import unseal

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "task", "prompt", "answer", "label")),
        ("choices", pa.list_(pa.string())),
        *((name, pa.string()) for name in ("source", "group")),
    ]
)
WIDE_SCHEMA = pa.schema(
    [
        *SCHEMA,
        ("time", pa.string()),
        ("weight", pa.float64()),
        ("segments", pa.list_(pa.string())),
        ("turns", pa.list_(pa.string())),  # role, content, role, content ...
    ]
)
"""Of sets whose examples have more than SCHEMA holds, as those of task files can."""
FACTS_KEY = b"finlora"
_MAX_FILE_BYTES, _MAX_BYTES = 2**28, 2**30
_MAX_SECONDS = 300.0
_ROWS_AT_ONCE = 64


def read_examples(path: Path) -> tuple[dict[str, Any] | None, tuple[Example, ...]]:
    """Return the metadata (None if FinLoRA did not write the file) and the examples, read in small parts.

    Raises:
        pa.ArrowException, OSError, ValueError, TypeError, MemoryError: it is damaged, too large, or holds anything but examples.
    """
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES:,} bytes")
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        facts = _facts(file.schema_arrow)
        schema = next((known for known in (SCHEMA, WIDE_SCHEMA) if file.schema_arrow.equals(known)), None)
        if facts is None or schema is None:
            return None, ()
        # Column by column: one unpacked page of every column could take 16 GiB. The metadata of columns is not read: if it is
        # damaged, pyarrow 26 ends the process at `row_group(n).column(n)`.
        columns: dict[str, list[Any]] = {}
        size, until = 0, time.monotonic() + _MAX_SECONDS
        for name in schema.names:
            columns[name] = []
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[name], use_threads=False):
                batch.validate(full=True)
                size += batch.get_total_buffer_size()
                if size > _MAX_BYTES or time.monotonic() > until:
                    raise ValueError(f"unpacked it has more than {_MAX_BYTES:,} bytes, or takes {_MAX_SECONDS:g} s")
                columns[name] += batch.column(0).to_pylist()
    examples = []
    for values in zip(*columns.values(), strict=True):
        examples.append(_make_example(dict(zip(schema.names, values, strict=True))))
    return facts, tuple(examples)


def make_table(examples: Sequence[Example], facts: Mapping[str, Any]) -> pa.Table:
    """Return the table of a split, with its facts as metadata; WIDE_SCHEMA only where an example needs it."""
    is_wide = any(item.time or item.weight != 1 or item.segments or item.turns for item in examples)
    schema = WIDE_SCHEMA if is_wide else SCHEMA
    columns = {name: [getattr(item, name) for item in examples] for name in schema.names}
    if is_wide:
        columns["turns"] = [[text for turn in item.turns for text in turn] for item in examples]
    return pa.table(columns, schema=schema.with_metadata({FACTS_KEY: json.dumps(facts, ensure_ascii=False).encode()}))


def _make_example(row: dict[str, Any]) -> Example:
    """Return the example of a row.

    Raises:
        TypeError, ValueError: a value is missing, or a conversation is not whole.
    """
    texts = [value for name, value in row.items() if name not in ("weight", "choices", "segments", "turns")]
    row["choices"] = tuple(row["choices"])
    texts += row["choices"]
    if "turns" in row:
        flat = row["turns"]
        row["turns"] = tuple(zip(flat[::2], flat[1::2], strict=True))
        row["segments"] = tuple(row["segments"])
        texts += (*flat, *row["segments"])
        if not (isinstance(row["weight"], float) and math.isfinite(row["weight"]) and row["weight"] > 0):
            raise ValueError("an example's weight is not a number above 0")
    if not all(isinstance(value, str) for value in texts):
        raise TypeError("an example is not whole")
    return Example(**row)


def _facts(schema: Any) -> dict[str, Any] | None:
    raw = (schema.metadata or {}).get(FACTS_KEY)
    needed = {"task", "split", "variant", "hash", "licence", "source", "version", "notes"}
    try:
        facts = unseal(json.loads(raw)) if raw is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or not needed <= set(facts) or not isinstance(facts["notes"], list):
        return None
    if not all(isinstance(facts.get(name), str | None) for name in ("card", "card_hash")):
        return None
    texts = [*(facts[name] for name in needed - {"notes"}), *facts["notes"]]
    return facts if all(isinstance(text, str) and text.isprintable() for text in texts) else None
