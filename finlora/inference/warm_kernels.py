"""Compilation of all GPU kernels of a base ahead of its use, for training and for answering, at 16, 8 and 4 bit (`finlora warm`).

Kernels depend on a base's widths, not on its number of layers or its weights: two layers of random weights compile all of them.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from finlora.config import Bits, ModelConfig, RunConfig
from finlora.data.encode import Encoded
from finlora.data.pack_size import pad_pack
from finlora.data.packing import pack_examples
from finlora.durable import hash_file, write_whole
from finlora.errors import ResourceError
from finlora.formula.llama import shape_of
from finlora.inference.in_process import InProcess
from finlora.inference.open_base import ODD_ROWS, choose_batch_rows, warm_up
from finlora.machine.kernel_folder import keep_kernels
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.base_files import BaseFiles
from finlora.model.layers.packed_model import PackedLlama, refusal
from finlora.model.lora import attach_lora
from finlora.stage.stage import Stage

ALL_BITS: tuple[Bits, ...] = (16, 8, 4)
_NUM_LAYERS = 2  # the first and the last layer of a training differ
_MARKS = "finlora"
"""Folder of the notes on what was compiled, in the folder of kernels."""
_PACKS = ((1, 40, 1), (6, 40, 2), (16, 90, 3))
"""(examples, tokens of each, tokens of its answer): some kernels are compiled apart for one row and for a multiple of 16."""


class Warmed(NamedTuple):
    """Kernels of one use of a base."""

    use: str
    """`training at 4 bit`."""
    num_kernels: int
    """Compiled now."""
    seconds: float
    is_known: bool
    """All were compiled before."""

    def describe(self) -> str:
        """Return one line."""
        if self.is_known:
            return f"{self.use}: compiled before"
        return f"{self.use}: {self.num_kernels} kernels compiled in {self.seconds:.1f} s"


def require_gpu() -> torch.device:
    """Return this machine's first GPU.

    Raises:
        ResourceError: torch sees none.
    """
    if not torch.cuda.is_available():
        raise ResourceError(
            "torch sees no GPU here, and kernels are compiled for the GPU of a machine: run `finlora warm` where the base will "
            "be used, or on a machine with the same GPU, and copy its folder of kernels. A CPU needs no such kernels."
        )
    return torch.device("cuda:0")


def warm_base(config: RunConfig, files: BaseFiles, announce: Callable[[Warmed], None]) -> list[Warmed]:
    """Compile all kernels of a base for this machine's first GPU that were not compiled before.

    Args:
        files: of the base; its weights are not read.
        announce: called after each use.

    Raises:
        ResourceError: there is no GPU, or its memory is too small for two layers.
    """
    device = require_gpu()
    folder = keep_kernels()
    small = shorten(files)
    done = []
    for bits in ALL_BITS:
        for name, run in (("training", _train), ("answering", _answer)):
            mark = folder / _MARKS / f"{_hash_facts(config, small, bits, name, device)}.json"
            use = f"{name} at {bits} bit"
            started, before = time.monotonic(), count_kernels(folder)
            if not (is_known := mark.is_file()):
                with quiet_bitsandbytes():
                    run(config, small, bits, device)
                torch.cuda.synchronize(device)
                torch.cuda.empty_cache()
                mark.parent.mkdir(parents=True, exist_ok=True)
                write_whole(mark, json.dumps({"use": use, **list_facts(device)}))
            warmed = Warmed(use, count_kernels(folder) - before, time.monotonic() - started, is_known)
            announce(warmed)
            done.append(warmed)
    return done


def shorten(files: BaseFiles) -> BaseFiles:
    """Return a base of random weights with the widths of another one, and two layers."""
    source = files.source
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = _NUM_LAYERS
    short = dataclasses.replace(source, config=config, shape=shape_of(config.to_dict()), shards={})
    return dataclasses.replace(files, source=short)


def list_facts(device: torch.device) -> dict[str, str]:
    """Return what must be the same on a machine that the folder of kernels is copied to."""
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    # Not from the packages' metadata, which a job's working directory lacks.
    return {
        "compute capability": f"{major}.{minor}",
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
    }


def count_kernels(folder: Path) -> int:
    """Return the number of compiled kernels in a folder."""
    return sum(1 for _ in folder.rglob("*.cubin"))


def _hash_facts(config: RunConfig, files: BaseFiles, bits: Bits, name: str, device: torch.device) -> str:
    """Return a name for all that the kernels of a use depend on."""
    root = Path(__file__).parents[1]
    sources = sorted(path for part in ("model", "stage") for path in (root / part).rglob("*") if path.is_file())
    facts = {
        **list_facts(device),
        "shape": dataclasses.asdict(files.source.shape),
        "use": [name, bits, config.lora.dropout > 0, list(config.lora.target_modules), config.model.compute_dtype],
        "gpu": torch.cuda.get_device_name(device),
        "sources": [hash_file(path) for path in sources if path.suffix in (".py", ".cu", ".cuh")],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _train(config: RunConfig, files: BaseFiles, bits: Bits, device: torch.device) -> None:
    """Run forward and backward passes of packs of several sizes."""
    for keep_unpacked in (False, True) if bits == 4 else (False,):
        base = load_base(_plain(config, files), bits, device, config.seed, files=files)
        model = attach_lora(base.model, config.lora, config.model.base, config.seed).train()
        if refusal(model) is not None:  # it trains on padded rows, by transformers' own kernels
            return
        module = PackedLlama(model, base.dtype, keep_unpacked=keep_unpacked)
        for num_items, length, num_answer in _PACKS:
            pack = pad_pack(pack_examples(_make_items(num_items, length, num_answer), share_prefix=True))
            module(pack.to(device)).backward()


def _answer(config: RunConfig, files: BaseFiles, bits: Bits, device: torch.device) -> None:
    """Run micro-batches of all shapes."""
    base = load_base(_plain(config, files), bits, device, config.seed, files=files, is_bare=True)
    num_rows = choose_batch_rows(1) + ODD_ROWS
    stage = Stage(base.model, range(_NUM_LAYERS), num_rows, base.dtype)
    warm_up(InProcess([stage]), num_rows, choose_batch_rows(1))


def _plain(config: RunConfig, files: BaseFiles) -> ModelConfig:
    return dataclasses.replace(config.model, weights="random", cache=None)


def _make_items(num_items: int, length: int, num_answer: int) -> Sequence[Encoded]:
    """Return examples that share the first half of their prompts."""
    half = tuple(range(1, length // 2 + 1))
    return [
        Encoded((*half, *(2 + (number + k) % 100 for k in range(length - len(half)))), tuple(range(3, 3 + num_answer)))
        for number in range(num_items)
    ]
