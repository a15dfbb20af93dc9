"""Requantisation of a merged model to compressed-tensors' pack-quantized format, which vLLM, SGLang and transformers load.

The projections of the decoder layers are rounded to nearest, symmetrically: 4 bit in groups of a row, each with the step of least
square error, 8 bit in whole rows. Embedding, norms, biases and head stay in bfloat16; activations are not rounded (W4A16, W8A16).

Source of names and packing: the library compressed-tensors (Apache-2.0), compressors/pack_quantized.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from finlora.errors import ConfigError, ModelError
from finlora.formula.llama import PROJECTION_NAMES

PackedBits = Literal[8, 4]
_GROUP = 32
"""Smallest group that vLLM's kernels take: half a bit a weight for its step, and the least error."""
_SHRINKS = tuple(1 - 0.02 * step for step in range(16))
"""Steps that are tried, as parts of the one at which the largest number of a group is not cut."""
_PROJECTION = re.compile(rf"model\.layers\.\d+\.\w+\.(?:{'|'.join(PROJECTION_NAMES)})\.weight")
_OWN = ("config.json", "model.safetensors.index.json")


def require_library() -> None:
    """Refuse an export without the optional library.

    Raises:
        ConfigError: says how to install it.
    """
    try:
        import compressed_tensors  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "the package compressed-tensors is not installed, which packs the weights: pip install 'finlora[vllm]'."
        ) from error


def requantise(merged: Path, output: Path, bits: PackedBits) -> str:
    """Write a merged model's folder with packed weights; returns the form in a few words.

    Args:
        merged: folder of a plain 16-bit model. It is not changed.
        output: existing empty folder.

    Raises:
        ModelError: the inputs of a projection are no multiple of a group.
    """
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from safetensors import safe_open
    from safetensors.torch import save_file

    shards = sorted(merged.glob("*.safetensors"))
    group = _GROUP if bits == 4 else None
    form: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": True}
    form |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    scheme = QuantizationScheme(targets=["Linear"], weights=form)
    index: dict[str, str] = {}
    for shard in shards:
        tensors = {}
        with safe_open(str(shard), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if not _PROJECTION.fullmatch(name):
                    tensors[name] = tensor
                    continue
                if group and tensor.shape[1] % group:
                    raise ModelError(
                        f"{name} has {tensor.shape[1]:,} inputs, and 4 bit needs a multiple of {group}: export it with --bits 8."
                    )
                state = {"weight": tensor.float(), "weight_scale": find_scales(tensor, bits, group)}
                packed = PackedQuantizationCompressor.compress(state, scheme)
                packed["weight_scale"] = packed["weight_scale"].to(tensor.dtype)
                tensors |= {f"{name.removesuffix('weight')}{key}": value for key, value in packed.items()}
        save_file(tensors, str(output / shard.name), metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, shard.name)
    if len(shards) > 1:
        total = sum((output / shard.name).stat().st_size for shard in shards)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (output / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    settings = QuantizationConfig(
        config_groups={"group_0": scheme},
        format="pack-quantized",
        quantization_status="compressed",
        ignore=["lm_head"],
    )
    config = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = settings.model_dump(mode="json", exclude_none=True)
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in merged.iterdir():
        if path.is_file() and path.suffix != ".safetensors" and path.name not in _OWN:
            shutil.copyfile(path, output / path.name)
    return f"{bits} bit, " + (f"groups of {group}" if group else "whole rows")


def find_scales(weight: Tensor, bits: PackedBits, group: int | None) -> Tensor:
    """Return the step between two levels of each group of a row, rounded to the weight's type, in float32.

    Shapes: (out, in) -> (out, in / group), or (out, 1) without groups.
    """
    top = 2 ** (bits - 1) - 1
    groups = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    whole = groups.abs().amax(2).clamp(min=1e-12) / top  # a group of zeros needs a step too
    best: Tensor = whole
    least = torch.full_like(whole, torch.inf)
    for shrink in _SHRINKS if group else (1.0,):
        scale = (whole * shrink).to(weight.dtype).float()
        levels = (groups / scale[..., None]).round_().clamp_(-top - 1, top)
        error = (levels * scale[..., None] - groups).square_().sum(2)
        is_better = error < least
        best, least = torch.where(is_better, scale, best), torch.where(is_better, error, least)
    return best
