"""Reader of raw rows from untrusted Arrow files: wrong offsets would read other memory, and a few compressed bytes can
expand to terabytes.

Messages are read one by one, each checked before any of its values is read. Only flat, uncompressed columns of text and
numbers are accepted, so that memory is bounded by the file's size.

Source of the message's layout: https://github.com/apache/arrow/blob/apache-arrow-20.0.0/format/Message.fbs
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finlora.data.raw.rows import MAX_RAW_BYTES, Row, refuse_empty, require_columns
from finlora.errors import DatasetError

_MAGIC = b"ARROW1\0\0"
_RECORD_BATCH_HEADER, _COMPRESSION = 2, 3  # indices of fields in the tables Message and RecordBatch


def read_arrow(path: Path, required: Sequence[str]) -> list[Row]:
    """Read an Arrow table in stream form, as the hub's cache stores it, or in file form, which is a stream with a frame.

    Raises:
        DatasetError: it is not Arrow, truncated, damaged or compressed, or lacks a column.
    """
    import pyarrow as pa

    if path.stat().st_size > MAX_RAW_BYTES:
        raise DatasetError(f"{path} has more than {MAX_RAW_BYTES:,} bytes: expected the file as published.")
    try:
        names, records = _read_records(path)
    except (pa.ArrowException, struct.error, OSError, MemoryError, ValueError, TypeError, LookupError) as error:
        raise DatasetError(
            f"{path} is not an Arrow stream or file ({error}): it may be truncated, so fetch it again."
        ) from error
    require_columns(names, required, path.name)
    rows = [Row(fields=fields, source=f"{path.name}:{number}") for number, fields in enumerate(records, start=1)]
    return refuse_empty(rows, path.name)


def _read_records(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the names of the flat columns, and their rows."""
    import pyarrow as pa

    records: list[dict[str, Any]] = []
    with pa.OSFile(str(path), "rb") as file:
        if file.read(len(_MAGIC)) != _MAGIC:
            file.seek(0)
        messages = pa.ipc.MessageReader.open_stream(file)
        first = next(iter(messages), None)
        if first is None or first.type != "schema":
            raise ValueError("it does not begin with a schema")
        schema = pa.ipc.read_schema(first)
        names = [field.name for field in schema if _is_flat(field.type)]
        if len(set(schema.names)) != len(schema.names):
            raise ValueError("two columns have one name")
        num_rows = 0
        for message in messages:
            if message.type != "record batch":
                raise ValueError(f"it holds a {message.type}, where only rows are expected")
            if _is_packed(message.metadata.to_pybytes()):
                raise ValueError("its rows are compressed, unlike the published file's")
            batch = pa.ipc.read_record_batch(message, schema)
            batch.validate(full=True)
            num_rows += batch.num_rows
            if num_rows * 8 > MAX_RAW_BYTES:  # rows without columns take no space in the file
                raise ValueError(f"it claims {num_rows:,} rows")
            records += batch.select(names).to_pylist()
    return names, records


def _is_flat(kind: Any) -> bool:
    import pyarrow as pa

    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return bool(is_text or pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind))


def _is_packed(metadata: bytes) -> bool:
    """Return whether a message's record batch is compressed; reads the flatbuffer, which Arrow has verified."""

    def offset_of(table: int, number: int) -> int | None:
        layout = table - struct.unpack_from("<i", metadata, table)[0]
        (size,) = struct.unpack_from("<H", metadata, layout)
        entry = 4 + 2 * number
        offset = struct.unpack_from("<H", metadata, layout + entry)[0] if entry < size else 0
        return table + offset if offset else None

    (root,) = struct.unpack_from("<I", metadata, 0)
    header = offset_of(root, _RECORD_BATCH_HEADER)
    if header is None:
        raise ValueError("a message has no header")
    return offset_of(header + struct.unpack_from("<I", metadata, header)[0], _COMPRESSION) is not None
