"""4-bit weights as bitsandbytes holds them: NF4 (arXiv:2305.14314, appendix E) with double quantisation, in blocks of 64.

For inference on a GPU they are put in another order (`Nf4Tiles`), in which the kernels read them end to end: 64 bytes of each of
many rows at a time come at little more than half of the memory's speed.
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
"""Blocks that share a scale of their levels."""
_BLOCK = 64


class Nf4Tiles(NamedTuple):
    """Rows of 4-bit layers of one input, joined, in tiles; a row's scale of a block is level_code[level] * level_scale + mean.

    Shapes: N outputs in all, K inputs, S = ceil(N / 32) strips of tiles.
    """

    tiles: Tensor
    """(S, K / 256, 4224) uint8, as finlora/model/kernels/nf4_tiles.cuh describes."""
    level_code: Tensor
    """(256,) float32: the numbers that levels stand for."""
    level_scales: Tensor
    """(N K / 16384,) float32."""
    means: Tensor
    """(N,) float32."""
    numbers: Tensor
    """(16,) float32: NF4's."""
    pairs: Tensor
    """(256,) int32: the two bfloat16 that a byte stands for, the even column's in the low bits."""

    def split(self, sizes: Sequence[int]) -> list[Nf4Tiles]:
        """Return views of the layers' own rows; their numbers of outputs must be multiples of 32."""
        columns = self.tiles.shape[1] * UNIT
        tiles = self.tiles.split([size // STRIP for size in sizes])
        scales = self.level_scales.split([size * columns // (_BLOCK * _NESTED) for size in sizes])
        means = self.means.split(list(sizes))
        return [
            self._replace(tiles=own, level_scales=scale, means=mean)
            for own, scale, mean in zip(tiles, scales, means, strict=True)
        ]


def unpack_nf4(layer: Any, dtype: torch.dtype) -> Tensor:
    """Return the (N, K) weight of a 4-bit layer in `dtype`; the values are the ones its own products use."""
    import bitsandbytes as bnb

    weight = layer.weight
    unpacked: Tensor = bnb.functional.dequantize_4bit(weight.data.view(-1, 1), weight.quant_state)
    return unpacked.to(dtype)


def can_tile(layers: Sequence[Any]) -> bool:
    """Return whether the blocks of 4-bit layers of one input line up with tiles, and those of all of them with each other."""
    for layer in layers:
        state = layer.weight.quant_state
        is_nested = state.nested and state.blocksize == _BLOCK and state.state2.blocksize == _NESTED
        if not is_nested or (len(layers) > 1 and len(state.absmax) % _NESTED):
            return False
    num_in = int(layers[0].in_features)
    # The kernels count weights in 32 bits.
    return num_in % UNIT == 0 and sum(int(layer.out_features) for layer in layers) * num_in < 2**32


def take_tiles(layers: Sequence[Any]) -> Nf4Tiles:
    """Join the rows of 4-bit layers and put them in tiles. The layers lose their weights: memory has room for these once."""
    states = [layer.weight.quant_state for layer in layers]
    sizes, num_in = [int(layer.out_features) for layer in layers], int(layers[0].in_features)
    packed = torch.cat([layer.weight.data.view(-1, num_in // 2) for layer in layers])
    levels = torch.cat([state.absmax.view(-1, num_in // _BLOCK) for state in states])
    means = torch.stack([state.offset.to(packed.device, torch.float32) for state in states])
    first = states[0]
    for layer in layers:
        layer.weight.module = None  # it points back at the layer: without this the weight would stay until a collection
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
    """Put rows in the order of `Nf4Tiles.tiles`; outputs that are missing to a whole tile are 0.

    Of a word of 4 bytes each has two columns' numbers: `side` says which of four, `eight` whether of output `place` or the one 8
    behind it.

    Shapes: packed (N, K / 2) and levels (N, K / 64) uint8, an even column in a byte's high half, -> (S, K / 256, 4224).
    """
    if missing := -len(packed) % STRIP:
        packed, levels = (torch.nn.functional.pad(part, (0, 0, 0, missing)) for part in (packed, levels))
    strips = len(packed) // STRIP
    #                  strip, m, eight, place, tile, half, group, quad, step, side
    split = packed.view(strips, 2, 2, 8, -1, 2, 2, 4, 4, 2)
    #                    strip, tile, half, m, group, place, quad, step, side, eight
    numbers = split.permute(0, 4, 5, 1, 6, 3, 7, 8, 9, 2).reshape(strips, -1, STRIP * UNIT // 2)
    scales = levels.view(strips, STRIP, -1, UNIT // _BLOCK).transpose(1, 2).reshape(strips, numbers.shape[1], -1)
    return torch.cat([numbers, scales], 2)


def pair_up(code: Tensor) -> Tensor:
    """Return `Nf4Tiles.pairs` of NF4's numbers. Shapes: (16,) float32 -> (256,) int32."""
    bits = code.bfloat16().view(torch.int16)
    return torch.stack([bits.repeat_interleave(16), bits.repeat(16)], 1).view(torch.int32)[:, 0].contiguous()
