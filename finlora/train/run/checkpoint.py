"""Checkpoints of a training run: adapter in float32, each worker's optimiser state, step; verified when read.

Layout of a checkpoint folder, for worker ranks r:
    adapter.safetensors        trainable parameters, float32 (rank 0; equal on all workers, see CheckpointSchedule)
    optimizer-r.pt             optimiser state of worker r, read with weights_only=True
    manifest-r.json            written last by worker r and sealed: size and SHA-256 of its files, step, world size, run
                               hash, and the worker's traffic so far
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from finlora.durable import SEAL, hash_file, seal, unseal, write_whole
from finlora.errors import CheckpointError, FinloraError
from finlora.optim.traffic import Wire

_ADAPTER = "adapter.safetensors"


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointInfo:
    """Identity of a checkpoint, from its manifests."""

    step: int
    """Optimiser steps done."""
    world_size: int
    run_hash: str
    """Hash of the settings and inputs that must not change on a resume."""


class CheckpointSchedule:
    """Schedule of checkpoints: every so many steps, at the end of each epoch and after the last step.

    A checkpoint that is due between two exchanges of 0/1 Adam, while the workers' weights differ, waits for the next step at
    which they agree. It never forces an exchange: `train.checkpoint_every_steps` may change on a resume and must not change
    what is computed. The last step always exchanges, so the last checkpoint never waits.
    """

    def __init__(self, *, steps_per_epoch: int, total_steps: int, every_steps: int | None) -> None:
        self.steps_per_epoch = steps_per_epoch
        self.total_steps = total_steps
        self.every_steps = every_steps
        self._is_owed = False

    def is_due(self, step: int, *, is_synchronised: bool) -> bool:
        """Return whether to write a checkpoint after `step` steps. Call it once a step, in order."""
        every = self.every_steps
        is_due = (
            step % self.steps_per_epoch == 0 or step == self.total_steps or (every is not None and step % every == 0)
        )
        self._is_owed = self._is_owed or is_due
        if not (self._is_owed and is_synchronised):
            return False
        self._is_owed = False
        return True


def require_finite(parameters: dict[str, torch.nn.Parameter], step: int) -> None:
    """Refuse to save NaN or infinity. The loss is checked only at logged steps.

    Raises:
        FinloraError: an adapter tensor holds NaN or infinity; names it.
    """
    bad = [name for name, parameter in parameters.items() if not torch.isfinite(parameter).all()]
    if bad:
        raise FinloraError(
            f"{len(bad)} adapter tensors hold NaN or infinity after step {step}, such as {bad[0]}: lower optim.learning_rate, or "
            "check the data for empty prompts; the last checkpoint is from before."
        )


def save_checkpoint(
    folder: Path,
    worker: int,
    info: CheckpointInfo,
    parameters: dict[str, torch.nn.Parameter],
    optimizer_state: dict[str, Any],
    wire: Wire,
) -> None:
    """Write this worker's part of a checkpoint into `folder`; the manifest comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"optimizer-{worker}.pt"]
    torch.save(optimizer_state, folder / names[0])
    if worker == 0:
        names.append(_ADAPTER)
        tensors = {name: p.detach().to("cpu", torch.float32).contiguous() for name, p in parameters.items()}
        save_file(tensors, str(folder / _ADAPTER))
    manifest = {
        "step": info.step,
        "world_size": info.world_size,
        "run_hash": info.run_hash,
        "wire": dataclasses.asdict(wire),
        "files": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": hash_file(folder / name)} for name in names
        },
    }
    write_whole(folder / f"manifest-{worker}.json", json.dumps(seal(manifest), indent=1))


def read_info(folder: Path, run_hash: str, world_size: int) -> CheckpointInfo:
    """Check that a checkpoint is complete and belongs to this run.

    Raises:
        CheckpointError: a part is missing or damaged, or the settings or the number of workers differ.
    """
    info: CheckpointInfo | None = None
    steps = set()
    for worker in range(world_size):
        path = folder / f"manifest-{worker}.json"
        try:
            manifest = _read_manifest(folder, worker)
            info = CheckpointInfo(**{key: manifest[key] for key in ("step", "world_size", "run_hash")})
            files = dict(manifest["files"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"checkpoint {folder} is incomplete: {path.name} cannot be read ({type(error).__name__}: {error}). Delete that "
                "folder to resume from the one before."
            ) from error
        steps.add(info.step)
        if info.world_size != world_size:
            raise CheckpointError(
                f"checkpoint {folder} was written by {info.world_size} workers, this run has {world_size}: set "
                f"train.num_workers={info.world_size}, or choose another `name` for a new run."
            )
        if info.run_hash != run_hash:
            raise CheckpointError(
                f"checkpoint {folder} is of a run with other settings or data: restore them, or choose another `name`."
            )
        for name, expected in files.items():
            file = folder / Path(name).name
            if not file.is_file() or file.stat().st_size != expected["bytes"] or hash_file(file) != expected["sha256"]:
                raise CheckpointError(
                    f"checkpoint {folder} is damaged: {name} is missing or differs from its manifest (expected "
                    f"{expected['bytes']} bytes). Delete that folder to resume from the one before."
                )
    if len(steps) > 1:
        raise CheckpointError(
            f"checkpoint {folder} is of steps {sorted(steps)} at once: expected one step of all workers. Delete that folder to "
            "resume from the one before."
        )
    assert info is not None
    return info


def load_checkpoint(
    folder: Path, worker: int, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> Wire:
    """Restore adapter and optimiser state bit for bit from a checkpoint that `read_info` has checked.

    Returns:
        This worker's traffic up to the checkpoint.
    """
    saved = load_file(str(folder / _ADAPTER))
    if saved.keys() != parameters.keys():
        raise CheckpointError(f"checkpoint {folder} holds other adapter tensors than lora.target_modules asks for.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    state = torch.load(folder / f"optimizer-{worker}.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(state)
    return Wire(**_read_manifest(folder, worker).get("wire", {}))


def _read_manifest(folder: Path, worker: int) -> dict[str, Any]:
    """Return a manifest. Raises OSError or ValueError where it is missing, damaged or altered."""
    manifest = json.loads((folder / f"manifest-{worker}.json").read_text(encoding="utf-8"))
    values = unseal(manifest)
    if SEAL not in manifest:
        raise ValueError(f"it has no {SEAL} of its own")
    return values
