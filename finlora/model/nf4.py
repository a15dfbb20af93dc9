"""4-bit weights as bitsandbytes holds them: NF4 (arXiv:2305.14314, appendix E) with double quantisation, in blocks of 64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNIT = 256
"""Columns of which the kernel for few rows reads a multiple."""


class Nf4Rows(NamedTuple):
    """Rows of 4-bit layers of one input, joined; a row's scale of a block is level_code[level] * level_scale + mean.

    Shapes: N outputs in all, K inputs.
    """

    packed: Tensor
    """(N K / 2,) uint8: an even column in a byte's high half, the odd one after it in the low half."""
    levels: Tensor
    """(N K / 64,) uint8."""
    level_code: Tensor
    """(256,) float32: the numbers that levels stand for."""
    level_scales: Tensor
    """(N K / 16384,) float32."""
    means: Tensor
    """(N,) float32."""
    pairs: Tensor
    """(256,) int32: the two bfloat16 that a byte stands for, the even column's in the low bits."""


def unpack_nf4(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the (N, K) weight of a 4-bit layer in `dtype`; the values are the ones its own products use."""
    import bitsandbytes as bnb

    weight = layer.weight
    unpacked: Tensor = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
    return unpacked.to(dtype)


def read_nf4(layers: Sequence[Any]) -> Nf4Rows | None:
    """Join the rows of 4-bit layers of one input, each keeping a view of its own; None where their blocks do not line up."""
    states = [layer.weight.quant_state for layer in layers]
    for state in states:
        is_nested = state.nested and state.blocksize == 64 and state.state2.blocksize == 256
        if not is_nested or (len(layers) > 1 and len(state.absmax) % 256):
            return None
    packed = _join([layer.weight for layer in layers], "data")
    levels, scales = _join(states, "absmax"), _join([state.state2 for state in states], "absmax")
    sizes = torch.tensor([layer.out_features for layer in layers], device=packed.device)
    means = torch.stack([state.offset.to(packed.device, torch.float32) for state in states])
    return Nf4Rows(
        packed, levels, states[0].state2.code, scales, means.repeat_interleave(sizes), pair_up(states[0].code)
    )


def _join(owners: Sequence[Any], name: str) -> Tensor:
    """Lay an attribute of several owners end to end, flat; each keeps a view of its own part."""
    parts = [getattr(owner, name) for owner in owners]
    joined = torch.cat(parts) if len(parts) > 1 else parts[0]
    for owner, view in zip(owners, joined.split([len(part) for part in parts]), strict=True):
        setattr(owner, name, view)
    return joined.view(-1)


def pair_up(code: Tensor) -> Tensor:
    """Return `Nf4Rows.pairs` of NF4's numbers. Shapes: (16,) float32 -> (256,) int32."""
    bits = code.bfloat16().view(torch.int16)
    return torch.stack([bits.repeat_interleave(16), bits.repeat(16)], 1).view(torch.int32)[:, 0].contiguous()
