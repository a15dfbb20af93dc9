"""Quantised linear layer: made from its weight, and converted losslessly to named tensors and back.

Quantisation is bitsandbytes': NF4 with double quantisation (QLoRA, arXiv:2305.14314, section 3) and LLM.int8()
(arXiv:2208.07339).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from finlora.config import Bits
from finlora.errors import ModelError
from finlora.machine.lean_imports import lean_imports
from finlora.model.kernels.nf4 import unpack_nf4


@functools.cache  # asked for at each tensor
def import_bitsandbytes() -> Any:
    """Import bitsandbytes without torch's compiler: of what it would compile, nothing is used here."""
    with lean_imports():
        import bitsandbytes
    return bitsandbytes


def quantise(weight: Tensor, bits: Bits, dtype: torch.dtype) -> nn.Module:
    """Quantise one (out, in) weight into a layer, on the weight's device.

    Args:
        bits: 8 or 4.
        dtype: type of the activations.
    """
    bnb = import_bitsandbytes()

    if bits == 4:
        layer = _make_linear4(weight.shape, dtype)
        parameter = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
        layer.weight = parameter.to(weight.device)
        return layer
    quantised, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return _make_linear8(quantised, scales)


def require_range(weight: Tensor, name: str, bits: Bits) -> None:
    """Refuse a weight that cannot be quantised: NaN and infinities, and at 8 bit numbers beyond float16, which int8 is made from.

    Such a number would spoil its quantisation block or row, silently on some devices.

    Raises:
        ModelError: names the tensor.
    """
    low, high = (float(value) for value in torch.aminmax(weight.detach()))  # no temporary copy; NaN passes through
    limit = torch.finfo(torch.float16).max if bits == 8 else torch.finfo(torch.float32).max
    if not (-limit <= low and high <= limit):
        raise ModelError(
            f"{name} holds numbers from {low:g} to {high:g}, and {bits} bit needs finite ones of at most {limit:g}: copy the "
            f"model again{', or load it at 4 or 16 bit' if bits == 8 else ''}."
        )


def dequantise(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the (out, in) weight that a layer holds, before its first forward pass: NF4 levels, or int8 rows times their scale.

    The product of a 4-bit layer uses these numbers; that of an 8-bit one also rounds the activations.
    """
    if hasattr(layer.weight, "quant_state"):
        return unpack_nf4(layer, dtype)
    values, scales = layer.weight.CB, layer.weight.SCB
    weight: Tensor = values.float() * (scales[:, None] / 127.0)
    return weight.to(dtype)


def layer_to_tensors(layer: Any) -> dict[str, Tensor]:
    """Return a layer's tensors under bitsandbytes' names, before its first forward pass."""
    weight = layer.weight
    if hasattr(weight, "quant_state"):
        return {"weight": weight.data, **weight.quant_state.as_dict(packed=True)}
    return {"weight": weight.CB, "SCB": weight.SCB}


def layer_from_tensors(
    tensors: Mapping[str, Tensor], shape: torch.Size, bits: Bits, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """Rebuild an (out, in) layer from `layer_to_tensors` on a device; its results are the same, bit for bit."""
    bnb = import_bitsandbytes()

    if bits == 4:
        layer = _make_linear4(shape, dtype)
        state = {name: tensor for name, tensor in tensors.items() if name != "weight"}
        layer.weight = bnb.nn.Params4bit.from_prequantized(tensors["weight"], state, device=device, module=layer)
        return layer
    return _make_linear8(tensors["weight"].to(device), tensors["SCB"].to(device))


def _make_linear4(shape: torch.Size, dtype: torch.dtype) -> nn.Module:
    bnb = import_bitsandbytes()

    num_out, num_in = shape
    layer: nn.Module = bnb.nn.Linear4bit(
        num_in, num_out, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta"
    )
    return layer


def _make_linear8(quantised: Tensor, scales: Tensor) -> nn.Module:
    bnb = import_bitsandbytes()

    num_out, num_in = quantised.shape
    layer: nn.Module = bnb.nn.Linear8bitLt(
        num_in, num_out, bias=False, has_fp16_weights=False, threshold=6.0, device="meta"
    )
    layer.weight = bnb.nn.Int8Params(quantised, requires_grad=False, has_fp16_weights=False, CB=quantised, SCB=scales)
    return layer
