"""Parquet file of a prepared split: its columns, its metadata, and a reader that does not trust it.

A dictionary-encoded text or a compressed page can expand a thousandfold: the reader stops at more than FinLoRA would have
written.
"""

from __future__ import annotations

import json
import time
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
FACTS_KEY = b"finlora"
_MAX_FILE_BYTES, _MAX_BYTES = 2**28, 2**30
_MAX_SECONDS = 300.0
_ROWS_AT_ONCE = 64


def read_examples(path: Path) -> tuple[dict[str, Any] | None, tuple[Example, ...]]:
    """Return what the metadata says, None where the file is not ours, and the examples, read in small parts.

    Raises:
        pa.ArrowException, OSError, ValueError, TypeError, MemoryError: it is damaged, too large, or holds what is no example.
    """
    if path.stat().st_size > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES:,} bytes")
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        facts = _facts(file.schema_arrow)
        if facts is None or not file.schema_arrow.equals(SCHEMA):
            return None, ()
        # One after the other: a page of each column at once, unpacked, could be 16 GiB. What the metadata says of columns
        # is not looked at: where it is damaged, pyarrow 26 ends the process at `row_group(n).column(n)`.
        columns: dict[str, list[Any]] = {}
        size, until = 0, time.monotonic() + _MAX_SECONDS
        for name in SCHEMA.names:
            columns[name] = []
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=[name], use_threads=False):
                batch.validate(full=True)
                size += batch.get_total_buffer_size()
                if size > _MAX_BYTES or time.monotonic() > until:
                    raise ValueError(f"unpacked it has more than {_MAX_BYTES:,} bytes, or takes {_MAX_SECONDS:g} s")
                columns[name] += batch.column(0).to_pylist()
    examples = []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(SCHEMA.names, values, strict=True))
        row["choices"] = tuple(row["choices"])
        if not all(isinstance(value, str) for value in (*values[:5], *row["choices"], *values[6:])):
            raise TypeError("an example is not whole")
        examples.append(Example(**row))
    return facts, tuple(examples)


def _facts(schema: Any) -> dict[str, Any] | None:
    raw = (schema.metadata or {}).get(FACTS_KEY)
    needed = {"task", "split", "variant", "hash", "licence", "source", "version", "notes"}
    try:
        facts = unseal(json.loads(raw)) if raw is not None else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(facts, dict) or not needed <= set(facts) or not isinstance(facts["notes"], list):
        return None
    texts = [*(facts[name] for name in needed - {"notes"}), *facts["notes"]]
    return facts if all(isinstance(text, str) and text.isprintable() for text in texts) else None
