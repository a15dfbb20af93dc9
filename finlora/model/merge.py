"""Merge of an adapter into its base at 16 bit, written as a Hugging Face folder that needs neither PEFT nor FinLoRA.

An adapter trained at 4 or 8 bit is fitted to rounded weights (QLoRA, arXiv:2305.14314). It can be merged onto the base's own
16-bit weights, or onto the rounded ones of its training, read back to 16 bit: then what was trained is what is served.

The folder holds config.json, safetensors shards, the tokenizer and merged.yaml, the record of base and adapter; also tasks.yaml
if the adapter was trained on task files. It is written under another name and renamed at the end, so an interrupted merge leaves
no loadable folder.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import torch
import yaml
from torch import nn

from finlora.config import Bits, ModelConfig
from finlora.data.chat_template import fix_inputs
from finlora.durable import follow_umask, scratch_folder
from finlora.errors import AdapterError, ModelError
from finlora.formula.llama import LlamaShape, shape_of
from finlora.formula.low_rank import gain_of, magnitude_name
from finlora.machine.host import require_space
from finlora.model.adapter_files import check_adapter, find_sites, open_weights, require_finite
from finlora.model.base import BaseModel, load_base, quiet_bitsandbytes, write_plain
from finlora.model.base_files import read_base_files
from finlora.model.contract import MERGED_FILE, TASKS_FILE, Contract, read_contract, read_tasks
from finlora.model.memory.fixed_memory import count_weight_bytes
from finlora.model.quantised import dequantise

Onto = Literal["base", "dequantised"]
"""Weights that the update is added to: the base's own at 16 bit, or those of the training, read back to 16 bit."""
_SPARE_BYTES = 64 * 2**20
"""Room for the tokenizer and the small files."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """Result of a merge."""

    folder: Path
    num_tensors: int
    """Number of changed base weights."""
    gib: float
    """Size of the folder."""
    trained_bits: int | None
    """Bits of the base that the adapter was trained on; None: unknown."""
    unknown: str
    """What is unknown of an adopted adapter; empty: nothing."""


def dequantise_base(base: BaseModel) -> BaseModel:
    """Replace the 8- or 4-bit layers of a base by dense ones of the same weights, in its compute type, in place."""
    for name, module in list(base.model.named_modules()):
        weight = getattr(module, "weight", None)
        if hasattr(weight, "quant_state") or hasattr(weight, "CB"):
            dense = nn.Linear(int(module.in_features), int(module.out_features), bias=False, device="meta")
            dense.weight = nn.Parameter(dequantise(module, base.dtype), requires_grad=False)
            dense.bias = module.bias
            base.model.set_submodule(name, dense)
    base.model.is_loaded_in_8bit = base.model.is_loaded_in_4bit = False
    return dataclasses.replace(base, bits=16)


def merge_lora(base: BaseModel, adapter: Path) -> int:
    """Add an adapter to the base weights: W <- W0 + scale B A, with DoRA m (W0 + scale B A) / ||W0 + scale B A||, in place.

    Shapes: W0 (out, in), A (rank, in), B (out, rank). The sum is computed in float32, then cast to the base's type. PEFT's
    merge multiplies in the adapter's type, bfloat16 here.

    Args:
        base: at 16 bit; it is changed.
        adapter: folder with PEFT's two files.

    Returns:
        Number of changed weights. Logits match the adapter's within 1e-5 in float32, and in bfloat16 within the
        rounding of W (tests/model/test_merge.py).

    Raises:
        ModelError: the base is at 8 or 4 bit.
        AdapterError: the folder is incomplete, uses another formula than LoRA's, or does not fit the base.
    """
    if base.bits != 16:
        raise ModelError(
            f"the base is loaded at {base.bits} bit, a merge needs 16: rounding the sum to {base.bits} bit "
            "would lose most of the adapter. Load the base with bits=16, or serve base and adapter unmerged."
        )
    updates = _read_adapter(adapter, shape_of(base.model.config.to_dict()))
    with torch.no_grad():
        for name, scale, *tensors in updates:
            weight = base.model.get_parameter(f"{name}.weight")
            down, up, *magnitude = (tensor.to(weight.device, torch.float32) for tensor in tensors)
            gains = [gain_of(lengths, weight, down, up, scale) for lengths in magnitude]
            total = weight.float().add_(up @ down, alpha=scale)
            for gain in gains:
                total.mul_(gain[:, None])
            weight.copy_(total)
            require_finite(weight, adapter, "the merged weight")
    return len(updates)


def export_merged(
    model: ModelConfig,
    adapter: Path,
    output: Path,
    device: torch.device,
    *,
    allow_other_bits: bool,
    onto: Onto = "base",
) -> Merged:
    """Load the base, merge the adapter and write the folder in bfloat16.

    On the base's own 16-bit weights, the logits of an adapter trained at 8 or 4 bit differ a little from those in training and
    evaluation, so the merged model must be evaluated again. The caller accepts that with `allow_other_bits`.

    Args:
        model: base, tokenizer and template of the adapter; `model.bits` and `model.compute_dtype` are ignored: a run on CPU
            may compute in float32, which would make the merged model twice as large as its base.
        device: where the sums are computed; the base at 16 bit must fit.
        onto: `dequantised` quantises the base as in training and reads it back.

    Raises:
        AdapterError: the adapter has another base, tokenizer or template, or other bits without `allow_other_bits`.
        ModelError: the base cannot be loaded, or `output` is not empty.
        ResourceError: the disk has too little space.
    """
    contract = read_contract(adapter)
    if onto == "dequantised" and contract.bits in (None, 16):
        found = "on a 16-bit base" if contract.bits else "at unknown bits of the base"
        raise AdapterError(
            f"{adapter} was trained {found}, so there are no quantised weights to read back: leave --onto out"
            f"{'' if contract.bits else ', or adopt it again with --bits if you know them'}."
        )
    if onto == "base" and contract.bits != 16 and not allow_other_bits:
        trained = f"on a {contract.bits}-bit base" if contract.bits else "at unknown bits of the base"
        raise AdapterError(
            f"{adapter} was trained {trained}, but a merge uses the 16-bit one: logits "
            "will differ from those in its evaluation. Merge it onto the weights of its training with --onto dequantised, allow "
            "it with --allow-other-bits and evaluate the merged model, or serve the adapter unmerged."
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ModelError(f"{output} exists and is not empty: give another folder for the merged model, or remove it.")
    files = read_base_files(model)
    date = files.check_adapter(adapter, contract)  # before anything large is read
    output.parent.mkdir(parents=True, exist_ok=True)
    require_space(
        output.parent, count_weight_bytes(files.shape, 16), "the merged model takes", spare_bytes=_SPARE_BYTES
    )
    bits = cast(Bits, contract.bits) if onto == "dequantised" else 16
    with quiet_bitsandbytes():
        base = load_base(dataclasses.replace(model, compute_dtype="bfloat16"), bits, device, seed=0, files=files)
        if onto == "dequantised":
            base = dequantise_base(base)
    num_tensors = merge_lora(base, adapter)
    if contract.template == "chat":
        fix_inputs(base.tokenizer, date)  # so that prompts made with the merged folder are those of training
    _write(base, contract, adapter, output, onto)
    size = sum(path.stat().st_size for path in output.iterdir())
    return Merged(
        folder=output,
        num_tensors=num_tensors,
        gib=size / 2**30,
        trained_bits=contract.bits,
        unknown=contract.describe_unknown(),
    )


def _read_adapter(folder: Path, base: LlamaShape) -> list[tuple[str, float, *tuple[torch.Tensor, ...]]]:
    """Return each update of an adapter as module name, scale, A and B, and with DoRA row lengths."""
    settings = check_adapter(folder)
    with open_weights(folder, settings) as (file, shapes):
        sites = find_sites(folder, settings, shapes, base)  # checks all before any weight changes
        updates = []
        for site in sites:
            names = [*site.names, *([magnitude_name(site.projection, site.layer)] if settings.dora else [])]
            tensors = [file.get_tensor(name) for name in names]
            updates.append((site.projection.path(site.layer), settings.scale_of(site.projection.name), *tensors))
        return updates


def _write(base: BaseModel, contract: Contract, adapter: Path, output: Path, onto: Onto) -> None:
    with scratch_folder(output.parent, f".{output.name}-") as staging:
        write_plain(base.model, staging, "4GB")
        base.tokenizer.save_pretrained(str(staging))
        provenance = {
            "merged": (
                "m (W0 + scale B A) / ||W0 + scale B A||" if "DoRA" in contract.lora_variant else "W0 + scale B A"
            )
            + ", summed in float32",
            "onto": onto,
            "weights": "the base's own"
            if onto == "base"
            else f"{contract.quantisation} as in training, read back to 16 bit",
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "adapter": adapter.name if adapter.name != "adapter" else f"{adapter.parent.name}/adapter",
            "contract": dataclasses.asdict(contract),
        }
        if read_tasks(adapter, contract):  # checked, then copied as it stands
            shutil.copyfile(adapter / TASKS_FILE, staging / TASKS_FILE)
        (staging / MERGED_FILE).write_text(yaml.safe_dump(provenance, sort_keys=False), encoding="utf-8")
        follow_umask(staging)
        staging.replace(output)
