"""Ray Train's list of a run's checkpoints, brought in line with the folders that are really there. No Ray here.

Ray Train (2.60) resumes from the list in `checkpoint_manager_snapshot.json`. It refuses to start where a listed folder was
deleted, or where a crash or a full disk cut the list short; and it never looks at folders that it did not list, so those
of a crash would stay for good. Hence the driver mends the list before each start.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from typing import Any

from finlora.errors import CheckpointError
from finlora.train.run.checkpoint import read_info

SNAPSHOT = "checkpoint_manager_snapshot.json"


def mend_snapshot(root: Path) -> list[str]:
    """List the checkpoints of a run folder anew where the list and the folders differ.

    Kept are listed folders that exist, and whole ones that a crash kept from being listed. Folders that are neither are
    removed. Damage inside a listed folder is not looked for here: the workers find it and say what to do.

    Args:
        root: the run's folder, with no process at work in it.

    Returns:
        Lines that tell the user what was changed; empty where the list was right.
    """
    state = _read(root / SNAPSHOT)
    listed = {entry["checkpoint_dir_name"]: entry for entry in state["checkpoint_results"]} if state else {}
    present = [path.name for path in root.glob("checkpoint_*") if path.is_dir()]
    kept = _in_order(root, list(listed), [name for name in present if name in listed or _is_whole(root / name)])
    lines = []
    for name in sorted(set(present) - set(kept)):
        shutil.rmtree(root / name)
        lines.append(f"Removed {root / name}: it was not written to its end.")
    if kept == list(listed) and (state is not None or not (root / SNAPSHOT).exists()):
        return lines
    lines += [f"{root / name} is gone." for name in listed if name not in kept]
    if state is None and (root / SNAPSHOT).exists():
        lines.append(f"{root / SNAPSHOT} was cut short: listed the checkpoints anew.")
    if not kept:
        (root / SNAPSHOT).unlink()
        return [*lines, "No checkpoint is left: the run starts from its first step."]
    entries = [listed.get(name, {"version": 0, "checkpoint_dir_name": name, "metrics": {}}) for name in kept]
    mended = (state or _EMPTY | {"ray_version": importlib.metadata.version("ray")}) | {
        "checkpoint_results": entries,
        "checkpoint_report_indices": list(range(len(entries))),
        "latest_checkpoint_result": entries[-1],
        "current_report_index": len(entries),
    }
    temporary = root / f".{SNAPSHOT}"
    temporary.write_text(json.dumps(mended), encoding="utf-8")
    temporary.replace(root / SNAPSHOT)
    return [*lines, f"The run goes on from {root / kept[-1]}."]


_EMPTY: dict[str, Any] = {
    "pending_training_results": [],
    "pending_validation_specs": [],
    "validated_checkpoint_dir_names": [],
    "timed_out_validation_checkpoint_dir_names": [],
    "failed_validation_checkpoint_dir_names": [],
}


def _read(path: Path) -> dict[str, Any] | None:
    """Return the list, or None where it is absent or no list any more."""
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        [entry["checkpoint_dir_name"] for entry in state["checkpoint_results"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state


def _in_order(root: Path, listed: list[str], names: list[str]) -> list[str]:
    """Sort checkpoints by their steps: their names are times, and a clock may have been set back between two of them."""
    steps: dict[str, int] = {}
    last = 0
    for name in listed:  # Ray lists them as they come, so a damaged one is as far as the one before
        last = steps[name] = _read_step(root / name, last)
    return sorted(names, key=lambda name: (steps.get(name) or _read_step(root / name, 0), name not in listed, name))


def _read_step(folder: Path, otherwise: int) -> int:
    try:
        return int(json.loads((folder / "manifest-0.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def _is_whole(folder: Path) -> bool:
    """Return whether all parts are there, whatever run it is of: the workers refuse another run's, and it stays."""
    # Ray copies a checkpoint's files in no order, so a manifest that is there proves nothing: the hashes must fit.
    try:
        manifest = json.loads((folder / "manifest-0.json").read_text(encoding="utf-8"))
        read_info(folder, manifest["run_hash"], manifest["world_size"])
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return False
    return True
