"""Products with a layer's frozen weights and their gradients by the input; nothing is saved for the backward pass.

Shapes: T rows, K in, N out. Projections of one input are one weight, their outputs side by side.

16 bit:  y = x W^T                                  dx = dy W
4 bit:   the same with W unpacked from NF4 for each product, one projection at a time, or unpacked once and kept; for inference
         on a GPU the packed weights are reordered into tiles
8 bit:   LLM.int8(), arXiv:2208.07339, section 3: rows of x and of W in int8, the products in int32; columns of x with an
         entry of magnitude >= 6 in 16 bit. dx = dy W with W unpacked, as bitsandbytes does.

bitsandbytes counts the outlier columns on the host, which synchronises at each product. Here the MAX_OUTLIERS strongest columns
are taken without counting; if there are more, the weakest are quantised like all others.

On a GPU, kernels of this package (few_nf4.cu, int8_decode.py, int8_prefill.py) run where the sizes allow it. A product of few
rows is bound by reading its weights: they are unpacked on the fly, at 8 bit too, so x is not rounded to int8.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from finlora.model.base import Int8Rows, read_int8
from finlora.model.kernels import launch
from finlora.model.kernels.int8_cpu import multiply_int8
from finlora.model.kernels.nf4 import STRIP, Nf4Tiles, can_tile, take_tiles, unpack_nf4
from finlora.model.layers.elementwise import gate

OUTLIER_THRESHOLD = 6.0
MAX_OUTLIERS = 64
MAX_FEW_ROWS = 64
"""Rows up to which reading the weights bounds a product, so they are unpacked on the fly."""
_MIN_INT8_ROWS = 32  # cuBLAS refuses int8 products of 16 rows and fewer
_INT8_COLUMNS = 128  # columns that a kernel reads per iteration


class FrozenWeight(Protocol):
    """One weight (N, K) that gets no gradient."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Return x W^T (+ residual). Shapes: (T, K) -> (T, N)."""
        ...

    def backward(self, grad: Tensor) -> Tensor:
        """Return grad W. Shapes: (T, N) -> (T, K)."""
        ...

    def dense(self) -> Tensor:
        """Return W (N, K) in the type of the activations, without bias and factor."""
        ...


class DenseWeight:
    """A weight in the type of the activations."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return x @ self.weight.t()
        return torch.addmm(residual, x, self.weight.t())

    def backward(self, grad: Tensor) -> Tensor:
        out: Tensor = grad @ self.weight
        return out

    def dense(self) -> Tensor:
        return self.weight


class _PackedParts:
    """Projections of one input, side by side, unpacked one after the other at each product.

    Args:
        parts: arguments of `_unpack`.
        sizes: outputs of each part.
    """

    def __init__(self, parts: Sequence[Any], sizes: Sequence[int]) -> None:
        self.parts, self.sizes = parts, list(sizes)

    def _unpack(self, part: Any) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if len(self.parts) == 1:
            return DenseWeight(self._unpack(self.parts[0])).forward(x, residual)
        out = x.new_empty(x.shape[0], sum(self.sizes))
        for part, columns in zip(self.parts, out.split(self.sizes, 1), strict=True):
            torch.mm(x, self._unpack(part).t(), out=columns)
        return out if residual is None else out.add_(residual)

    def backward(self, grad: Tensor) -> Tensor:
        columns = grad.split(self.sizes, 1)
        total: Tensor = columns[0] @ self._unpack(self.parts[0])
        for part, own in zip(self.parts[1:], columns[1:], strict=True):
            total.addmm_(own, self._unpack(part))
        return total

    def dense(self) -> Tensor:
        return torch.cat([self._unpack(part) for part in self.parts])


class Nf4Weight(_PackedParts):
    """4-bit projections in bitsandbytes' layout."""

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype) -> None:
        super().__init__(layers, [int(layer.out_features) for layer in layers])
        self.dtype = dtype

    def _unpack(self, part: Any) -> Tensor:
        return unpack_nf4(part, self.dtype)


class TiledNf4Weight(_PackedParts):
    """4-bit projections on a GPU, in the tiles that kernels of few rows read; computes in bfloat16.

    Args:
        layers: consumed: they lose their weights.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        sizes = [int(layer.out_features) for layer in layers]
        self.tiles = take_tiles(layers)
        if all(size % STRIP == 0 for size in sizes):
            super().__init__(self.tiles.split(sizes), sizes)
        else:  # some tiles hold rows of two projections
            super().__init__([self.tiles], [sum(sizes)])

    def _unpack(self, part: Nf4Tiles) -> Tensor:
        from finlora.model.kernels.nf4_products import unpack_tiles

        return unpack_tiles(part)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if x.shape[0] > MAX_FEW_ROWS:
            return super().forward(x, residual)
        from finlora.model.kernels.nf4_products import few_nf4

        return few_nf4(x.contiguous(), self.tiles, None if residual is None else residual.contiguous())


class BiasedWeight:
    """Projections of one input with a frozen bias (N,): x W^T + b. Its gradient by the input is the weight's."""

    def __init__(self, weight: FrozenWeight, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias
        # Kernels read a residual of all rows; torch's products broadcast one row, and cuBLAS adds it as it writes the product.
        self._broadcasts = isinstance(weight, DenseWeight | Nf4Weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            return self.weight.forward(x, residual + self.bias)
        start = self.bias if self._broadcasts else self.bias.expand(x.shape[0], -1).contiguous()
        return self.weight.forward(x, start)

    def backward(self, grad: Tensor) -> Tensor:
        return self.weight.backward(grad)

    def dense(self) -> Tensor:
        return self.weight.dense()


class ScaledWeight:
    """Projections of one input whose result is multiplied before it is added to a residual: scale (x W^T + b) + residual."""

    def __init__(self, weight: FrozenWeight, scale: float) -> None:
        self.weight, self.scale = weight, scale

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.weight.forward(x)
        return out.mul_(self.scale) if residual is None else torch.add(residual, out, alpha=self.scale)

    def backward(self, grad: Tensor) -> Tensor:
        return self.weight.backward(grad).mul_(self.scale)

    def dense(self) -> Tensor:
        return self.weight.dense()


def split_bias(weight: FrozenWeight) -> tuple[FrozenWeight, Tensor | None]:
    """Return a weight without its bias, and what it adds to the product; None: nothing."""
    if isinstance(weight, ScaledWeight):
        bare, bias = split_bias(weight.weight)
        return ScaledWeight(bare, weight.scale), None if bias is None else bias * weight.scale
    return (weight.weight, weight.bias) if isinstance(weight, BiasedWeight) else (weight, None)


def multiply_gated(weight: FrozenWeight, x: Tensor) -> Tensor:
    """Return silu(gate) * up of a weight made of gate and up projection. Shapes: (T, K) -> (T, N / 2)."""
    if isinstance(weight, TiledNf4Weight) and x.shape[0] <= MAX_FEW_ROWS:
        from finlora.model.kernels.nf4_products import few_gated_nf4

        return few_gated_nf4(x.contiguous(), weight.tiles)
    return gate(weight.forward(x))


class Int8Weight:
    """8-bit projections, side by side as one int8 matrix."""

    def __init__(self, rows: Int8Rows, dtype: torch.dtype) -> None:
        self.values, self.scales = rows
        self.dtype = dtype

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if launch.takes_kernels(x):
            if x.shape[0] <= MAX_FEW_ROWS:
                return self._forward_few(x.contiguous(), residual)
            if x.shape[1] % _INT8_COLUMNS == 0:
                return self._forward_many(x.contiguous(), residual)
        num_columns = min(MAX_OUTLIERS, x.shape[1])
        strength, columns = torch.topk(_find_outliers(x), num_columns)
        is_outlier = strength > 0
        held_back = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device).scatter_(0, columns, is_outlier)
        quantised, row_scales = _quantise_rows(x, held_back)
        if missing := max(0, _MIN_INT8_ROWS - len(quantised)):
            quantised = nn.functional.pad(quantised, (0, 0, 0, missing))
        product = multiply_int8(quantised, self.values)[: x.shape[0]]
        out = _scale_product(product, row_scales, self.scales, self.dtype)
        weights = _unpack_int8(self.values[:, columns], self.scales, self.dtype)
        out.addmm_(x[:, columns] * is_outlier, weights.t())
        return out if residual is None else out.add_(residual)

    def _forward_few(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Return the product without rounding x, so that no row influences another, whatever the sizes."""
        if x.shape[1] % _INT8_COLUMNS:
            return DenseWeight(_unpack_int8(self.values, self.scales, self.dtype)).forward(x, residual)
        from finlora.model.kernels.int8_decode import few_int8

        return few_int8(x, self.values, self.scales, residual)

    def _forward_many(self, x: Tensor, residual: Tensor | None) -> Tensor:
        from finlora.model.kernels import int8_prefill

        columns, is_chosen, is_held = int8_prefill.choose_columns(_find_outliers(x), MAX_OUTLIERS)
        quantised, row_scales = _quantise_rows(x, is_held)
        few_x = _take_columns(x, columns, is_chosen)
        few_weights = _unpack_int8(self.values[:, columns], self.scales, self.dtype)
        return int8_prefill.many_int8(quantised, row_scales, self.values, self.scales, few_x, few_weights, residual)

    def backward(self, grad: Tensor) -> Tensor:
        return grad @ _unpack_int8(self.values, self.scales, self.dtype)

    def dense(self) -> Tensor:
        return _unpack_int8(self.values, self.scales, self.dtype)


def freeze(modules: Sequence[Any], dtype: torch.dtype, *, consumes: bool = False, scale: float = 1.0) -> FrozenWeight:
    """Take the weights and biases of linear layers of one input. The layers keep working, on views of the same memory.

    Args:
        modules: nn.Linear or bitsandbytes layers, all of one kind.
        dtype: type of the activations.
        consumes: the layers may stop working: on a GPU, 4-bit weights are then reordered into tiles.
        scale: factor of the result.
    """
    biases = [module.bias for module in modules]
    sizes = [int(module.out_features) for module in modules]
    weight = _freeze_weights(modules, dtype, consumes=consumes)
    if any(bias is not None for bias in biases):
        parts = zip(biases, sizes, strict=True)
        device = next(bias.device for bias in biases if bias is not None)
        rows = [torch.zeros(size, device=device) if bias is None else bias.detach() for bias, size in parts]
        weight = BiasedWeight(weight, torch.cat([row.to(dtype) for row in rows]))
    return weight if scale == 1 else ScaledWeight(weight, scale)


def _freeze_weights(modules: Sequence[Any], dtype: torch.dtype, *, consumes: bool) -> FrozenWeight:
    if all(type(module) is nn.Linear for module in modules):
        weights = [module.weight for module in modules]
        joined = torch.cat(weights).to(dtype) if len(modules) > 1 else weights[0].detach().to(dtype)
        _share(modules, joined)
        return DenseWeight(joined)
    if all(is_nf4(module) for module in modules):
        has_kernels = launch.takes_kernels(modules[0].weight) and dtype == torch.bfloat16
        return TiledNf4Weight(modules) if consumes and has_kernels and can_tile(modules) else Nf4Weight(modules, dtype)
    return Int8Weight(read_int8(modules), dtype)


def unpack(layer: Any, dtype: torch.dtype) -> nn.Linear:
    """Turn a 4-bit layer into a dense one of the same values: memory grows fourfold, and products unpack nothing."""
    dense = nn.Linear(int(layer.in_features), int(layer.out_features), bias=False, device="meta")
    dense.weight = nn.Parameter(unpack_nf4(layer, dtype), requires_grad=False)
    dense.bias = layer.bias
    # It points back at the layer: that cycle would keep the packed weight until a garbage collection.
    layer.weight.module = None
    return dense


def is_nf4(layer: Any) -> bool:
    """Return whether a layer's weight is packed at 4 bit."""
    return hasattr(layer.weight, "quant_state")


def _share(modules: Sequence[Any], joined: Tensor) -> None:
    for module, part in zip(modules, joined.split([module.weight.shape[0] for module in modules]), strict=True):
        module.weight = nn.Parameter(part, requires_grad=False)


def _find_outliers(x: Tensor) -> Tensor:
    """Return each column's largest outlier magnitude, 0 without an outlier. Shapes: (T, K) -> (K,)."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.int8_steps import find_outliers_rows

        return find_outliers_rows(x, OUTLIER_THRESHOLD)
    magnitude = x.to(torch.float16).abs()
    return torch.where(magnitude >= OUTLIER_THRESHOLD, magnitude, 0.0).amax(0)


def _quantise_rows(x: Tensor, held_back: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 rows and their largest magnitudes. Held-back columns (kept in 16 bit) become 0; their outliers do not count."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise import int8_steps

        return int8_steps.quantise_rows(x, held_back, OUTLIER_THRESHOLD)
    half = x.to(torch.float16)
    half = torch.where((half.abs() >= OUTLIER_THRESHOLD) & held_back, 0.0, half)
    scales = half.abs().amax(1).float()
    rounded = torch.round(half.float() * (127.0 / scales.clamp(min=1e-12))[:, None])
    return torch.where(held_back, 0.0, rounded).to(torch.int8), scales


def _take_columns(x: Tensor, columns: Tensor, is_chosen: Tensor) -> Tensor:
    if launch.takes_kernels(x):
        from finlora.model.rowwise.int8_steps import take_columns_rows

        return take_columns_rows(x, columns, is_chosen)
    return x[:, columns] * is_chosen


def _scale_product(product: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype) -> Tensor:
    if launch.takes_kernels(product):
        from finlora.model.rowwise.int8_steps import scale_product_rows

        return scale_product_rows(product, rows, columns, dtype)
    return (product * (rows[:, None] * columns[None]) * (1 / 127.0**2)).to(dtype)


def _unpack_int8(values: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    if launch.takes_kernels(values):
        from finlora.model.rowwise.int8_steps import unpack_int8_rows

        return unpack_int8_rows(values, scales, dtype)
    return (values.float() * (scales[:, None] * (1 / 127.0))).to(dtype)
