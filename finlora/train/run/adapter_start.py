"""New adapter of a run, the same on each worker and after a resume, also where it begins with a part of the base's weights.

PiSSA and OLoRA leave the base without that part (finlora/model/lora.py). Another machine may find another part, where singular
values are nearly equal, so worker 0 finds it once and writes it into the run's folder; all later starts read it there.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finlora.config import RunConfig
from finlora.durable import scratch_folder
from finlora.errors import CheckpointError
from finlora.model.lora import Start, attach_lora, read_start
from finlora.train.run.run_folder import RunFolder

if TYPE_CHECKING:
    from peft import PeftModel


def attach_adapter(
    net: Any, config: RunConfig, folder: RunFolder, run_hash: str, worker: int
) -> tuple[PeftModel, Start | None]:
    """Put the run's adapter on the base. Collective where `lora.init` takes a part out of the base.

    Args:
        run_hash: of settings and inputs; a part that another run found is found anew.

    Returns:
        The model, and the part that its base now lacks; None: nothing.

    Raises:
        CheckpointError: the file of the part is damaged.
    """
    attach = partial(attach_lora, net, config.lora, config.model.base, config.seed)
    if not config.lora.changes_base:
        return attach(), None
    if worker == 0 and _read(folder.adapter_start, run_hash) is None:
        model = attach()
        start = read_start(model)
        _write(folder.adapter_start, start, run_hash)
        _await_others()
        return model, start
    _await_others()
    found = _read(folder.adapter_start, run_hash)
    if found is None:
        raise CheckpointError(
            f"{folder.adapter_start} is missing on this node: the folder of the run must be on storage that all nodes share."
        )
    return attach(start=found), found


def _await_others() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _read(path: Path, run_hash: str) -> Start | None:
    """Return the part that this run found earlier; None: it has found none."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            facts = file.metadata() or {}
            start = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    if facts.get("run") != run_hash:
        return None
    if facts.get("sha256") != _hash(start):
        raise _damaged(path, "its numbers differ from its hash")
    return start


def _write(path: Path, start: Start, run_hash: str) -> None:
    from safetensors.torch import save_file

    with scratch_folder(path.parent, f".{path.name}-") as staging:
        facts = {"format": "pt", "run": run_hash, "sha256": _hash(start)}
        save_file(
            {name: tensor.contiguous() for name, tensor in start.items()}, str(staging / path.name), metadata=facts
        )
        (staging / path.name).replace(path)


def _hash(start: Start) -> str:
    digest = hashlib.sha256()
    for name in sorted(start):
        digest.update(name.encode())
        digest.update(start[name].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _damaged(path: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged ({found}): it holds what the run took out of the base's weights, and its checkpoints fit no other. "
        "Restore the file from a copy, or train under another `name`."
    )
