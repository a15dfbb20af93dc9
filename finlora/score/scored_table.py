"""Output table of a scoring: the input's files, row for row, with the result columns added after their own.

It is written part by part under a temporary name, then renamed. Memory holds one part, or one row group.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finlora.errors import ConfigError
from finlora.score.folder import ScoreFolder, find_arrow_type
from finlora.score.score_plan import ScorePlan
from finlora.score.table import FORMATS, Part, RowGroups, TableFile, find_tables, read_lines, read_rows

if TYPE_CHECKING:
    import pyarrow as pa


def check_output(source: Path, out: Path) -> None:
    """Check an output's name against the input's before the input is read.

    Raises:
        DatasetError: the input is not a table or a folder of tables.
        ConfigError: the output is the input or inside it, has another format, or exists and no scoring wrote it.
    """
    find_tables(source)
    if out.resolve() == source.resolve():
        raise ConfigError(f"{out} is the input: choose another output.")
    if source.is_dir():
        if out.suffix.lower() in FORMATS:
            raise ConfigError(f"{source} is a folder, so the output is one too: {out.name} names a file.")
        if out.resolve().is_relative_to(source.resolve()):
            raise ConfigError(f"{out} is inside the input folder: choose an output outside it.")
    else:
        suffix = source.suffix.lower()
        allowed = [suffix, *([".parquet"] if FORMATS[suffix] == "csv" else [])]
        if out.suffix.lower() not in allowed:
            raise ConfigError(f"{out.name}: expected a name that ends in {' or '.join(allowed)}, as the input does.")
    ScoreFolder(out).refuse_foreign()


def write_output(plan: ScorePlan, folder: ScoreFolder) -> None:
    """Write the output from the sealed parts under a temporary name, then rename it."""
    table, out = plan.table, folder.out
    temporary = out.with_name(f".{out.name}.writing")
    if temporary.is_dir():
        shutil.rmtree(temporary)
    temporary.unlink(missing_ok=True)
    if not table.root.is_dir():
        _write_file(plan, folder, 0, temporary, out.suffix.lower())
    else:
        temporary.mkdir()
        for index, file in enumerate(table.files):
            _write_file(plan, folder, index, temporary / file.path.name, file.path.suffix.lower())
        if out.is_dir():  # this scoring was killed after it wrote its output, before it removed its parts
            shutil.rmtree(out)
    temporary.replace(out)


def _write_file(plan: ScorePlan, folder: ScoreFolder, index: int, path: Path, suffix: str) -> None:
    parts = [part for part in plan.table.parts if part.file == index]
    file = plan.table.files[index]
    if suffix == ".parquet":
        _write_parquet(plan, folder, file, parts, path)
    else:
        with path.open("w", encoding="utf-8", newline="") as stream:
            for text in _write_text(plan, folder, file, parts):
                stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())


def _write_text(plan: ScorePlan, folder: ScoreFolder, file: TableFile, parts: list[Part]) -> Iterator[str]:
    """Yield the output's text, one part at a time."""
    if file.format == "jsonl":
        for part in parts:
            results = folder.read_part(part.number, part.num_rows).to_pylist()
            yield "".join(map(_join_json, read_lines(file.path, part), results))
        return
    yield _join_fields([[*file.columns, *plan.columns]], file.delimiter)
    groups = RowGroups()
    for part in parts:
        rows = read_rows(plan.table, part, groups)
        results = folder.read_part(part.number, part.num_rows).to_pylist()
        yield _join_fields(
            (
                [*row.values(), *(_as_field(result[name]) for name in plan.columns)]
                for row, result in zip(rows, results, strict=True)
            ),
            file.delimiter,
        )


def _join_json(line: str, result: dict[str, Any]) -> str:
    """Return a JSON object's text with keys added: numbers keep their digits, keys their order."""
    body = line[:-1].rstrip()
    separator = "" if body == "{" else ", "
    return f"{body}{separator}{json.dumps(result, ensure_ascii=False)[1:]}\n"


def _join_fields(records: Iterable[Iterable[str]], delimiter: str) -> str:
    """Return records as CSV. Python's csv writer does not quote a lone carriage return, and its reader then refuses it."""
    special = re.compile(f'["\r\n{re.escape(delimiter)}]')

    def quote(field: str) -> str:
        return '"' + field.replace('"', '""') + '"' if special.search(field) else field

    # A record of one empty field needs quotes: readers skip an empty line.
    return "".join((delimiter.join(map(quote, record)) or '""') + "\n" for record in records)


def _as_field(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _write_parquet(plan: ScorePlan, folder: ScoreFolder, file: TableFile, parts: list[Part], path: Path) -> None:
    """Write Parquet, one row group per part; CSV fields become text."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    is_parquet = file.format == "parquet"
    schema = pq.read_schema(file.path) if is_parquet else pa.schema([(name, pa.string()) for name in file.columns])
    for name, column in plan.columns.items():
        schema = schema.append(pa.field(name, find_arrow_type(column)))
    groups = RowGroups()
    with pq.ParquetWriter(path, schema) as writer:
        for part in parts:
            rows = (
                groups.read(file.path, part, None)
                if is_parquet
                else _to_table(read_rows(plan.table, part, groups), file)
            )
            results = folder.read_part(part.number, part.num_rows)
            for name in plan.columns:
                rows = rows.append_column(name, results.column(name))
            writer.write_table(rows.cast(schema), row_group_size=part.num_rows)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _to_table(rows: Any, file: TableFile) -> pa.Table:
    import pyarrow as pa

    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in file.columns})
