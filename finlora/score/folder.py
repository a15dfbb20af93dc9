"""Folder of a scoring in progress: its sealed parts, and the record that binds them to inputs, adapter and settings.

Beside OUT during a scoring:
    OUT.parts/manifest.json     the binding; another adapter, task or input is refused
    OUT.parts/part-000000.parquet   results of a part's rows, in their order; complete as soon as it has this name
    OUT.parts/lock              held by the process that scores
After it: OUT, and OUT.manifest.json with the binding, the counts and the hashes of the written files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finlora.durable import seal, try_lock, unseal, write_whole
from finlora.errors import ConfigError, ResultError
from finlora.score.score_plan import ScoreColumn, describe_difference

if TYPE_CHECKING:
    import pyarrow as pa


class ScoreFolder:
    """Paths of one scoring.

    Args:
        out: output file or folder.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.parts = out.with_name(out.name + ".parts")
        self.manifest = out.with_name(out.name + ".manifest.json")

    @contextlib.contextmanager
    def locked(self, binding: Mapping[str, Any]) -> Iterator[None]:
        """Hold the lock of the folder, which is made if it is missing.

        Raises:
            ConfigError: another process scores into it, or its parts belong to another scoring.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        with (self.parts / "lock").open("w") as stream:
            if not try_lock(stream):
                raise ConfigError(f"another process scores into {self.out}: wait for it, or choose another output.")
            record = self._read(self.parts / "manifest.json")
            if record is None:
                write_whole(self.parts / "manifest.json", json.dumps(seal({"binding": binding}), indent=2) + "\n")
            elif difference := describe_difference(record["binding"], dict(binding)):
                raise ConfigError(
                    f"{self.parts} holds parts of another scoring ({difference}): choose another output, or remove that folder."
                )
            yield

    def refuse_foreign(self) -> None:
        """Refuse an output that no scoring wrote.

        Raises:
            ConfigError: it exists.
        """
        if self.out.exists() and not self.manifest.exists() and not self.parts.exists():
            raise ConfigError(
                f"{self.out} exists and was not written by `finlora score`: choose another output, or remove it."
            )

    def find_finished(self, binding: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the record of the same scoring, if it is finished.

        Raises:
            ConfigError: the output exists, and another scoring or something else wrote it.
        """
        self.refuse_foreign()
        record = self._read(self.manifest)
        if record is None or not self.out.exists():
            return None
        if difference := describe_difference(record["binding"], dict(binding)):
            raise ConfigError(
                f"{self.out} was written by another scoring ({difference}): choose another output, or remove it and "
                f"{self.manifest.name}."
            )
        return record

    def is_sealed(self, number: int) -> bool:
        return self.path(number).exists()

    def path(self, number: int) -> Path:
        return self.parts / f"part-{number:06d}.parquet"

    def write_part(self, number: int, columns: Mapping[str, ScoreColumn], results: Sequence[Mapping[str, Any]]) -> None:
        """Seal the results of a part: written under a temporary name, then renamed.

        Args:
            results: for each row its values by key; a missing value becomes null.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        arrays = [
            pa.array([result.get(column.key) for result in results], find_arrow_type(column))
            for column in columns.values()
        ]
        temporary = self.parts / f".part-{number:06d}.{os.getpid()}-{threading.get_ident()}"
        try:
            pq.write_table(pa.table(arrays, names=list(columns)), temporary)
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(self.path(number))
        finally:
            temporary.unlink(missing_ok=True)

    def read_part(self, number: int, num_rows: int) -> pa.Table:
        """Return the results of a sealed part.

        Raises:
            ResultError: the file was changed after it was sealed.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            results = pq.read_table(self.path(number))
        except (pa.ArrowException, OSError) as error:
            raise ResultError(
                f"{self.path(number)} cannot be read ({error}): remove it, and run the same command again."
            ) from error
        if len(results) != num_rows:
            raise ResultError(
                f"{self.path(number)} holds {len(results):,} results, expected {num_rows:,}: remove it, and run the same command "
                "again."
            )
        return results

    def finish(self, record: Mapping[str, Any]) -> None:
        """Record what was written, and remove the parts."""
        write_whole(self.manifest, json.dumps(seal(record), indent=2) + "\n")
        shutil.rmtree(self.parts)

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            return unseal(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ResultError(f"{path} cannot be read ({error}): remove it, or choose another output.") from error


def find_arrow_type(column: ScoreColumn) -> pa.DataType:
    """Return the Arrow type of an added column."""
    import pyarrow as pa

    types = {"text": pa.string(), "number": pa.float64(), "position": pa.int64(), "flag": pa.bool_()}
    return types[column.kind]
