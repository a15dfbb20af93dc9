"""NF4 weights with double quantisation in blocks of 64, in bitsandbytes' layout and in tiles (arXiv:2305.14314, appendix E).

For inference on a GPU they are reordered into tiles (`Nf4Tiles`), which the kernels read contiguously: reading 64 bytes of each
of many rows reaches little more than half of the memory bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNIT = 256
"""Columns of a tile."""
STRIP = 32
"""Outputs of a tile."""
_NESTED = 256
"""Blocks whose levels share a scale."""
_BLOCK = 64


class Nf4Tiles(NamedTuple):
    """Joined rows of 4-bit layers of one input, in tiles. The scale of a block is level_code[level] * level_scale + mean.

    Shapes: N outputs in all, K inputs, S = ceil(N / 32) strips of tiles.
    """

    tiles: Tensor
    """(S, K / 256, 4224) uint8, as finlora/model/kernels/nf4_tiles.cuh describes."""
    level_code: Tensor
    """(256,) float32: value of each level."""
    level_scales: Tensor
    """(N K / 16384,) float32."""
    means: Tensor
    """(N,) float32."""
    numbers: Tensor
    """(16,) float32: value of each NF4 code."""
    pairs: Tensor
    """(256,) int32: the two bfloat16 values of each byte, the even column's in the low bits."""

    def split(self, sizes: Sequence[int]) -> list[Nf4Tiles]:
        """Return views of each layer's rows; `sizes` are multiples of 32."""
        columns = self.tiles.shape[1] * UNIT
        tiles = self.tiles.split([size // STRIP for size in sizes])
        scales = self.level_scales.split([size * columns // (_BLOCK * _NESTED) for size in sizes])
        means = self.means.split(list(sizes))
        return [
            self._replace(tiles=own, level_scales=scale, means=mean)
            for own, scale, mean in zip(tiles, scales, means, strict=True)
        ]


def unpack_nf4(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the weight (N, K) of a 4-bit layer in `dtype`, with the values that bitsandbytes' products use."""
    import bitsandbytes as bnb

    weight = layer.weight
    unpacked: Tensor = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
    return unpacked.to(dtype)


def can_tile(layers: Sequence[Any]) -> bool:
    """Return whether the blocks of 4-bit layers of one input are aligned with tiles and with each other."""
    for layer in layers:
        state = layer.weight.quant_state
        is_nested = state.nested and state.blocksize == _BLOCK and state.state2.blocksize == _NESTED
        if not is_nested or (len(layers) > 1 and len(state.absmax) % _NESTED):
            return False
    num_in = int(layers[0].in_features)
    # The kernels count weights in 32 bits.
    return num_in % UNIT == 0 and sum(int(layer.out_features) for layer in layers) * num_in < 2**32


def take_tiles(layers: Sequence[Any]) -> Nf4Tiles:
    """Join the rows of 4-bit layers in tiles. The layers lose their weights, so that memory holds these once."""
    states = [layer.weight.quant_state for layer in layers]
    sizes, num_in = [int(layer.out_features) for layer in layers], int(layers[0].in_features)
    packed = torch.cat([layer.weight.data.view(-1, num_in // 2) for layer in layers])
    levels = torch.cat([state.absmax.view(-1, num_in // _BLOCK) for state in states])
    means = torch.stack([state.offset.to(packed.device, torch.float32) for state in states])
    first = states[0]
    for layer in layers:
        layer.weight.module = None  # it points back at the layer: that cycle would keep the weight until a collection
        layer.weight = None
    return Nf4Tiles(
        lay_tiles(packed, levels),
        first.state2.code,
        torch.cat([state.state2.absmax for state in states]),
        means.repeat_interleave(torch.tensor(sizes, device=packed.device)),
        first.code,
        pair_up(first.code),
    )


def lay_tiles(packed: Tensor, levels: Tensor) -> Tensor:
    """Put rows in the order of `Nf4Tiles.tiles`; outputs that pad the last tile are 0.

    A byte holds the codes of two columns, a word of 4 bytes those of four columns of two outputs: `side` selects the column pair,
    `eight` output `out` or `out` + 8.

    Shapes: packed (N, K / 2) and levels (N, K / 64) uint8, an even column in a byte's high half, -> (S, K / 256, 4224).
    """
    if missing := -len(packed) % STRIP:
        packed, levels = (torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (packed, levels))
    strips = len(packed) // STRIP
    #                  strip, m, eight, out, tile, half, group, quad, step, side
    split = packed.view(strips, 2, 2, 8, -1, 2, 2, 4, 4, 2)
    #                    strip, tile, half, m, group, out, quad, step, side, eight
    numbers = split.permute(0, 4, 5, 1, 6, 3, 7, 8, 9, 2).reshape(strips, -1, STRIP * UNIT // 2)
    scales = levels.view(strips, STRIP, -1, UNIT // _BLOCK).transpose(1, 2).reshape(strips, numbers.shape[1], -1)
    return torch.cat([numbers, scales], 2)


def pair_up(code: Tensor) -> Tensor:
    """Return `Nf4Tiles.pairs` of NF4's numbers. Shapes: (16,) float32 -> (256,) int32."""
    bits = code.bfloat16().view(torch.int16)
    return torch.stack([bits.repeat_interleave(16), bits.repeat(16)], 1).view(torch.int32)[:, 0].contiguous()
