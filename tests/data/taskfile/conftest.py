"""Small tables and the task files over them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from letters import LETTERS

from finlora.data.task import Request, Task
from finlora.data.taskfile.read import open_task_file


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., Path]:
    """Write rows as a table, in the format of the name's suffix."""

    def write(rows: list[dict[str, Any]], name: str = "rows.csv") -> Path:
        path = tmp_path / name
        if path.suffix in (".csv", ".tsv"):
            with path.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        else:
            import pyarrow as pa
            import pyarrow.feather as feather
            import pyarrow.parquet as pq

            table = pa.Table.from_pylist(rows)
            if path.suffix == ".parquet":
                pq.write_table(table, path)
            else:
                feather.write_feather(table, path, compression="uncompressed")
        return path

    return write


@pytest.fixture
def write_task(tmp_path) -> Callable[..., Path]:
    """Write a task file: LETTERS with changed keys; None removes a key."""

    def write(**changes: Any) -> Path:
        tree = {key: value for key, value in {**LETTERS, **changes}.items() if value is not None}
        path = tmp_path / "task.yaml"
        path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
        return path

    return write


@pytest.fixture
def read_task(write_task) -> Callable[..., Any]:
    """Return the splits of LETTERS with changed keys."""

    def read(**changes: Any) -> Any:
        return read_all(open_task_file(write_task(**changes)))

    return read


def read_all(task: Task) -> Any:
    return task.read(Request(source=None, variant="own", splits="all"))
