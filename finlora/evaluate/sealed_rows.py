"""Reader of a sealed JSON file beside an adapter's weights: records of one kind, and the hash of the adapter they are of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from finlora.configfile import settings_from_tree
from finlora.durable import unseal
from finlora.errors import AdapterError, ConfigError
from finlora.model.adapter_files import check_file

Record = TypeVar("Record")


def read_sealed_rows(
    path: Path, record: type[Record], *, key: str, version: int, max_bytes: int, what: str, again: str
) -> tuple[tuple[Record, ...], str]:
    """Return the records of a file, and its `adapter_hash`.

    Args:
        record: dataclass of a row.
        key: of the rows in the file.
        version: value of `format` that is read.
        what: the file should be, in the message.
        again: sentence on how to write it again.

    Raises:
        AdapterError: the file is damaged or of another format.
    """
    try:
        check_file(path, max_bytes)
        values: Mapping[str, Any] = unseal(json.loads(path.read_bytes()))
        if values["format"] != version:
            raise ValueError(f"it has format {values['format']!r}, expected {version}")
        rows = tuple(settings_from_tree(record, each) for each in values[key])
        return rows, str(values["adapter_hash"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ConfigError) as error:
        raise AdapterError(f"{path} is not {what} ({error}). {again}") from error
