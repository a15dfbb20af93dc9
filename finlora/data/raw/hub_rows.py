"""Reader of a task's rows from the hub, used only without --source; respects HF_HUB_OFFLINE."""

from __future__ import annotations

import os
from collections.abc import Sequence

from finlora.data.raw.rows import Row
from finlora.errors import DatasetError
from finlora.machine.foreign_errors import shorten
from finlora.machine.model_hub import find_hub_problem


def load_hub_rows(
    hub_id: str, split: str, required: Sequence[str], revision: str | None = None, data_dir: str | None = None
) -> list[Row]:
    """Load one split of a hub dataset. Never runs the dataset's code.

    Args:
        hub_id: `owner/name` on the hub.
        split: the hub's name of the split.
        required: columns that must exist.
        revision: branch, tag or commit. None: the default branch.
        data_dir: folder inside the repository. None: all of it.

    Raises:
        DatasetError: the hub is offline or unreachable, the dataset cannot be read, or it lacks a split or column.
    """
    problem = find_hub_problem()
    if problem is not None:
        os.environ["HF_HUB_OFFLINE"] = "1"  # a cached copy is used, and otherwise loading fails at once
    import datasets

    try:
        table = datasets.load_dataset(hub_id, split=split, revision=revision, data_dir=data_dir)
    except Exception as error:  # errors of several libraries, all of which mean "not loaded"
        raise DatasetError(
            f"{hub_id} (split {split}) could not be loaded from the hub: {problem or shorten(error)}. Expected a "
            "reachable hub or a cached copy. Without one, pass the raw files with --source FOLDER."
        ) from error
    missing = [column for column in required if column not in table.column_names]
    if missing:
        raise DatasetError(
            f"{hub_id} (split {split}): found columns {', '.join(table.column_names)}, expected {', '.join(required)}. "
            "The dataset has changed: pass the published raw files with --source FOLDER."
        )
    rows = [
        Row(fields=dict(fields), source=f"{hub_id}/{split}:{number}") for number, fields in enumerate(table, start=1)
    ]
    if not rows:
        raise DatasetError(f"{hub_id} (split {split}) has no rows: expected at least one. Use --source FOLDER.")
    return rows
