"""Fold an adapter into its 16-bit base and write a plain Hugging Face folder, which needs neither PEFT nor FinLoRA.

The folder holds config.json, safetensors shards, the tokenizer and merged.yaml, which says where all of it comes from.
It is written under another name and renamed as a whole, so an interrupted merge leaves no folder that loads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from torch import nn

from finlora.config import ModelConfig
from finlora.data.chat_template import fix_date
from finlora.durable import follow_umask, scratch_folder
from finlora.errors import AdapterError, ModelError
from finlora.model.adapter_files import check_adapter, open_weights, require_finite
from finlora.model.base import BaseModel, load_base
from finlora.model.base_files import read_base_files
from finlora.model.contract import Contract, read_contract

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

MERGED_FILE = "merged.yaml"
_PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What a merge wrote."""

    folder: Path
    num_tensors: int
    """Base weights that were changed."""
    gib: float
    """Size of the folder."""
    trained_bits: int
    """Bits of the base that the adapter was trained on."""


def merge_lora(base: BaseModel, adapter: Path) -> int:
    """Fold an adapter into the base weights: W <- W0 + (alpha / rank) B A, in place.

    Shapes: W0 (out, in), A (rank, in), B (out, rank). The sum is taken in float32, then cast to the base's type. PEFT's own
    merge multiplies in the adapter's type, bfloat16 here.

    Args:
        base: at 16 bit. Changed: reload it to have the base again.
        adapter: folder with PEFT's two files.

    Returns:
        How many weights were changed. Logits match the adapter's within 1e-5 in float32, and in bfloat16 within the
        rounding of W (tests/model/test_merge.py).

    Raises:
        ModelError: the base is at 8 or 4 bit.
        AdapterError: the folder is incomplete, uses another formula than LoRA's, or does not fit the base.
    """
    if base.bits != 16:
        raise ModelError(
            f"the base is loaded at {base.bits} bit, a merge needs 16: rounded to {base.bits} bit again, the "
            "sum would lose most of the adapter. Load the base with bits=16, or serve base and adapter unmerged."
        )
    scale, tensors = _read_adapter(adapter)
    names = sorted(name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight"))
    if not names or len(tensors) != 2 * len(names):
        raise AdapterError(
            f"{adapter} holds {len(tensors)} tensors that are not pairs of lora_A and lora_B: train it again."
        )
    pairs = []
    for name in names:  # all are checked before the first is changed
        weight = _find_weight(base.model, name.removeprefix(_PREFIX), adapter)
        down, up = tensors[f"{name}.lora_A.weight"], tensors.get(f"{name}.lora_B.weight")
        if up is None or (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            raise AdapterError(
                f"{adapter} does not fit the base: {name} has A {list(down.shape)} and B "
                f"{list(up.shape) if up is not None else 'missing'} for a weight {list(weight.shape)}."
            )
        pairs.append((weight, down, up))
    with torch.no_grad():
        for weight, down, up in pairs:
            update = up.to(weight.device, torch.float32) @ down.to(weight.device, torch.float32)
            weight.copy_(weight.float().add_(update, alpha=scale))
            require_finite(weight, adapter, "the merged weight")
    return len(pairs)


def export_merged(
    model: ModelConfig, adapter: Path, output: Path, device: torch.device, *, allow_other_bits: bool
) -> Merged:
    """Load the base at 16 bit, merge the adapter and write the folder in bfloat16.

    An adapter trained at 8 or 4 bit learnt to mend the rounding of its quantised base as well (QLoRA, arXiv:2305.14314).
    On the 16-bit base its logits then differ a little from those it was trained and scored with, so the merged model must be
    evaluated again; hence `allow_other_bits` is a choice that the caller makes.

    Args:
        model: base, tokenizer and template of the adapter; `model.bits` and `model.compute_dtype` are not read: a run on CPU
            may compute in float32, and a merged model of that type would be twice as large as the base it comes from.
        device: where the sums are taken; the whole base at 16 bit must fit.

    Raises:
        AdapterError: the adapter is of another base, tokenizer, template, or of other bits without `allow_other_bits`.
        ModelError: the base cannot be loaded, or `output` holds something already.
    """
    contract = read_contract(adapter)
    if contract.bits != 16 and not allow_other_bits:
        raise AdapterError(
            f"{adapter} was trained on a {contract.bits}-bit base and a merge is made on the 16-bit one: logits "
            "will differ from those it was scored with. Allow it with --allow-other-bits and evaluate the merged model, or "
            "serve the adapter unmerged."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output} exists and is not empty: name another folder for the merged model, or remove it.")
    date = read_base_files(model).check_adapter(adapter, contract)  # before anything large is read
    base = load_base(dataclasses.replace(model, compute_dtype="bfloat16"), 16, device, seed=0)
    contract.check(adapter, base, model.template)
    num_tensors = merge_lora(base, adapter)
    fix_date(base.tokenizer, date)  # whoever reads the folder writes the prompts that the adapter was trained with
    _write(base, contract, adapter, output)
    size = sum(path.stat().st_size for path in output.iterdir())
    return Merged(folder=output, num_tensors=num_tensors, gib=size / 2**30, trained_bits=contract.bits)


def _read_adapter(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Return alpha / rank and all tensors."""
    settings = check_adapter(folder)
    with open_weights(folder, settings) as (file, shapes):
        return settings.scale, {name: file.get_tensor(name) for name in shapes}


def _find_weight(net: LlamaForCausalLM, name: str, adapter: Path) -> torch.Tensor:
    try:
        module = net.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise AdapterError(
            f"{adapter} has an update for {name}, which this base does not have: merge it into its own base."
        )
    return module.weight


def _write(base: BaseModel, contract: Contract, adapter: Path, output: Path) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output.parent, f".{output.name}-") as staging:
        base.model.save_pretrained(str(staging), max_shard_size="4GB")
        base.tokenizer.save_pretrained(str(staging))
        provenance = {
            "merged": "W0 + (alpha / rank) B A, summed in float32",
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "adapter": adapter.name if adapter.name != "adapter" else f"{adapter.parent.name}/adapter",
            "contract": dataclasses.asdict(contract),
        }
        (staging / MERGED_FILE).write_text(yaml.safe_dump(provenance, sort_keys=False), encoding="utf-8")
        follow_umask(staging)
        staging.replace(output)
