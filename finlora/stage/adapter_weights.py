"""LoRA adapters of a stage: many on one base, read from PEFT folders for the stage's own layers.

Shapes: rank r, in K, out N of a projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from finlora.formula.llama import LlamaShape, Product
from finlora.formula.low_rank import Update, gain_of, magnitude_name
from finlora.model.adapter_files import (
    find_sites,
    hash_weights_and_settings,
    open_weights,
    read_lora_settings,
    require_finite,
)

Adapter = Mapping[tuple[int, Product], list[Update]]
"""(layer, product) -> its updates."""


_MAX_GATHERED_ROWS = 64
"""Rows up to which each row gathers its adapter's matrices. More rows are multiplied by all adapters' and masked."""


class Bank:
    """Stacked matrices of all adapters of a span, from which each row of a pass selects an adapter by its number.

    Number 0 is the base alone. The tensors keep their addresses until a further adapter does not fit: CUDA graphs read them.
    """

    def __init__(self) -> None:
        self.numbers: dict[str | None, int] = {None: 0}
        self._pairs: dict[tuple[int, Product], tuple[Tensor, Tensor]] = {}
        self._gains: dict[tuple[int, Product], Tensor] = {}
        self._room = 2

    def add(self, name: str, adapter: Adapter, num_out: Mapping[Product, int]) -> bool:
        """Add an adapter; returns whether tensors moved.

        Args:
            num_out: columns of each product.
        """
        number = next(n for n in range(self._room + 1) if n not in self.numbers.values())
        self.numbers[name] = number  # first, so that `remove` also clears up after a failure
        has_moved = number == self._room
        self._room *= 2 if has_moved else 1
        # Also of products without an update of this adapter: its rows index them too.
        for key, (downs, ups) in self._pairs.items():
            if len(downs) < self._room:
                self._pairs[key], has_moved = self._grow((downs, ups), downs[0], ups[0]), True
        for key, gains in self._gains.items():
            if len(gains) < self._room:
                self._gains[key], has_moved = (
                    torch.cat([gains, gains.new_zeros(self._room - len(gains), gains.shape[1])]),
                    True,
                )
        for (layer, product), updates in adapter.items():
            down = torch.cat([update.down for update in updates])
            up = down.new_zeros(len(down), num_out[product])
            start = 0
            for update in updates:
                size = len(update.down)
                up[start : start + size, update.columns] = (update.up * update.scale).t()
                start += size
            pair = self._pairs.get((layer, product))
            if pair is None or pair[0].shape[1] < len(down):
                pair, has_moved = self._grow(pair, down, up), True
                self._pairs[layer, product] = pair
            pair[0][number, : len(down)], pair[1][number, : len(down)] = down, up
            for update in updates:
                if update.gain is not None:
                    if (layer, product) not in self._gains:
                        self._gains[layer, product] = down.new_zeros(self._room, num_out[product])
                        has_moved = True
                    self._gains[layer, product][number, update.columns] = update.gain
        return has_moved

    def remove(self, name: str) -> None:
        number = self.numbers.pop(name)
        for down, up in self._pairs.values():
            down[number : number + 1].zero_()  # an empty slice where the tensors had not grown yet
            up[number : number + 1].zero_()
        for gains in self._gains.values():
            gains[number : number + 1].zero_()

    def has_gains(self, layer: int, product: Product) -> bool:
        """Return whether any adapter so far scaled a product of the base: DoRA."""
        return (layer, product) in self._gains

    def scale(self, out: Tensor, numbers: Tensor, layer: int, product: Product) -> Tensor:
        """Scale a product of the base by each row's adapter. Shapes: out (T, N), numbers (T,) -> (T, N)."""
        return out.addcmul(out, self._gains[layer, product][numbers])

    def touches(self, layer: int, product: Product) -> bool:
        """Return whether any adapter so far had an update of a product."""
        return (layer, product) in self._pairs

    def apply(self, out: Tensor, x: Tensor, numbers: Tensor, layer: int, product: Product) -> Tensor:
        """Add each row's update to a product. Shapes: out (T, N), x (T, K), numbers (T,) -> (T, N)."""
        pair = self._pairs.get((layer, product))
        if pair is None:
            return out
        downs, ups = pair
        if len(x) <= _MAX_GATHERED_ROWS:
            low = torch.bmm(downs[numbers], x[..., None])
            return out + torch.bmm(low.transpose(1, 2), ups[numbers])[:, 0]
        low = (x @ downs.flatten(0, 1).t()).view(len(x), *downs.shape[:2])
        is_own = numbers[:, None, None] == torch.arange(len(downs), device=x.device)[None, :, None]
        # Selected, not multiplied by 0: another adapter's result for a row may be infinite.
        return out.addmm_(torch.where(is_own, low, 0).flatten(1), ups.flatten(0, 1))

    def _grow(self, pair: tuple[Tensor, Tensor] | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Return zero-padded copies with room for all numbers and ranks."""
        rank = max(len(down), 0 if pair is None else pair[0].shape[1])
        downs, ups = (tensor.new_zeros(self._room, rank, tensor.shape[1]) for tensor in (down, up))
        if pair is not None:
            count, old_rank = pair[0].shape[:2]
            downs[:count, :old_rank], ups[:count, :old_rank] = pair
        return downs, ups


def hash_adapter(folder: Path) -> str:
    """Return 16 hex digits over an adapter's weights and settings.

    Raises:
        AdapterError: one of them is missing.
    """
    return hash_weights_and_settings(folder)[:16]


def read_adapter(
    folder: Path,
    shape: LlamaShape,
    span: range,
    dtype: torch.dtype,
    device: torch.device,
    read_weight: Callable[[int, Product], Tensor],
) -> Adapter:
    """Read an adapter's tensors for a span of layers.

    DoRA's lengths are constant here, so that it is a factor of the base's product, and a plain update with that factor in B.

    Args:
        read_weight: returns the base's weight (N, K) of a product of a layer of the span; asked for DoRA alone.

    Raises:
        AdapterError: files are missing, it is not a plain LoRA that fits a model of that shape, or not all numbers are finite.
    """
    settings = read_lora_settings(folder)
    adapter: dict[tuple[int, Product], list[Update]] = {}
    with open_weights(folder, settings) as (file, shapes):
        # Checked for all layers, so that every stage refuses the same adapters.
        for layer, projection, columns, names in find_sites(folder, settings, shapes, shape):
            if layer in span:
                down, up = (file.get_tensor(name) for name in names)
                for name, tensor in zip(names, (down, up), strict=True):
                    require_finite(tensor, folder, name)
                own, gain = settings.scale_of(projection.name), None
                down, up = down.to(device), up.to(device)
                if settings.dora:
                    name = magnitude_name(projection, layer)
                    magnitude = file.get_tensor(name).to(device)
                    factor = gain_of(magnitude, read_weight(layer, projection.product)[columns], down, up, own)
                    require_finite(factor, folder, name)
                    up, gain = up.float() * factor[:, None], (factor - 1).to(dtype)
                scale = own * shape.product_scale(projection.product)
                update = Update(columns, down.to(dtype), up.to(dtype), scale, gain)
                adapter.setdefault((layer, projection.product), []).append(update)
    return adapter
