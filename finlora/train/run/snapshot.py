"""Repair of Ray Train's list of checkpoints, so that it matches the checkpoint folders on disk. No Ray here.

Ray Train (2.60) resumes from the list in `checkpoint_manager_snapshot.json`. It refuses to start where a listed folder was
deleted, or where a crash or a full disk truncated the list. It ignores folders that are not listed, so incomplete ones of a
crash would stay. Therefore the driver repairs the list before each start.
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


def repair_snapshot(root: Path) -> list[str]:
    """Rewrite the list of checkpoints where it differs from the folders.

    Listed folders that exist are kept, and so are complete ones that a crash kept off the list. All other checkpoint folders
    are removed. Listed folders are not checked for damage here: the workers do that when they read them.

    Args:
        root: the run's folder, in which no process works.

    Returns:
        Lines for the user about what was changed; empty where the list was right.
    """
    state = _read(root / SNAPSHOT)
    listed = {entry["checkpoint_dir_name"]: entry for entry in state["checkpoint_results"]} if state else {}
    present = [path.name for path in root.glob("checkpoint_*") if path.is_dir()]
    kept = _in_order(root, list(listed), [name for name in present if name in listed or _is_whole(root / name)])
    lines = []
    for name in sorted(set(present) - set(kept)):
        shutil.rmtree(root / name)
        lines.append(f"Removed {root / name}: it was incomplete.")
    if kept == list(listed) and (state is not None or not (root / SNAPSHOT).exists()):
        return lines
    lines += [f"{root / name} is missing." for name in listed if name not in kept]
    if state is None and (root / SNAPSHOT).exists():
        lines.append(f"{root / SNAPSHOT} was truncated: listed the checkpoints again.")
    if not kept:
        (root / SNAPSHOT).unlink()
        return [*lines, "No checkpoint is left: the run starts from its first step."]
    entries = [listed.get(name, {"version": 0, "checkpoint_dir_name": name, "metrics": {}}) for name in kept]
    repaired = (state or _EMPTY | {"ray_version": importlib.metadata.version("ray")}) | {
        "checkpoint_results": entries,
        "checkpoint_report_indices": list(range(len(entries))),
        "latest_checkpoint_result": entries[-1],
        "current_report_index": len(entries),
    }
    temporary = root / f".{SNAPSHOT}"
    temporary.write_text(json.dumps(repaired), encoding="utf-8")
    temporary.replace(root / SNAPSHOT)
    return [*lines, f"The run resumes from {root / kept[-1]}."]


_EMPTY: dict[str, Any] = {
    "pending_training_results": [],
    "pending_validation_specs": [],
    "validated_checkpoint_dir_names": [],
    "timed_out_validation_checkpoint_dir_names": [],
    "failed_validation_checkpoint_dir_names": [],
}


def _read(path: Path) -> dict[str, Any] | None:
    """Return the list; None where it is missing or damaged."""
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        [entry["checkpoint_dir_name"] for entry in state["checkpoint_results"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state


def _in_order(root: Path, listed: list[str], names: list[str]) -> list[str]:
    """Sort checkpoints by step. Their names are times, which go wrong when a clock is set back."""
    steps: dict[str, int] = {}
    last = 0
    for name in listed:  # Ray lists them in order, so a damaged one counts as the one before it
        last = steps[name] = _read_step(root / name, last)
    return sorted(names, key=lambda name: (steps.get(name) or _read_step(root / name, 0), name not in listed, name))


def _read_step(folder: Path, otherwise: int) -> int:
    try:
        return int(json.loads((folder / "manifest-0.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return otherwise


def _is_whole(folder: Path) -> bool:
    """Return whether all parts are there, of whichever run: the workers refuse another run's checkpoint, and it stays."""
    # Ray copies a checkpoint's files in any order, so a manifest alone proves nothing: the hashes must match.
    try:
        manifest = json.loads((folder / "manifest-0.json").read_text(encoding="utf-8"))
        read_info(folder, manifest["run_hash"], manifest["world_size"])
    except (CheckpointError, OSError, ValueError, KeyError, TypeError):
        return False
    return True
