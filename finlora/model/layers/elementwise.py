"""Elementwise steps of a Llama layer and their gradients, in plain torch; on a GPU each is compiled into one kernel.

Shapes: T rows, H hidden, I intermediate, h heads of width d, k adapted projections. Reductions run in float32 and results
are rounded to the input's type at the same points as in transformers' LlamaRMSNorm, LlamaMLP and apply_rotary_pos_emb.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")

_DRAWS = 2**16
"""Range of the 16-bit random numbers of a mask."""
_ASSUMED_ROWS = 2048
"""Number of rows that torch.compile assumes for the kernels of `fused_sum`."""


def fused(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function for CUDA tensors at its first call; on CPU it runs uncompiled."""
    compiled: list[Any] = []

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not _is_on_gpu(args[0]):
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function))
        result: _R = compiled[0](*args, **kwargs)
        return result

    return call


def fused_sum(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a step that sums over each row into one kernel whose order of summation depends on the row's width alone.

    torch.compile chooses warps and blocks, and with them the order, by the number of rows at compilation; it compiles again when
    that number changes, and may choose by timing. A resumed process sees other packs first, so its sums would round differently:
    in bfloat16 that changes the loss of 16 examples by up to 0.04 (SmolLM2-135M). So the number of rows is marked dynamic from
    the first call, with the hint `_ASSUMED_ROWS`, and nothing is timed.

    Rows are the last dimension but one.
    """
    compiled: list[Any] = []
    seen: set[tuple[object, ...]] = set()

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not _is_on_gpu(args[0]):
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function, options={"deterministic": True}))
        kind = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *map(_describe, args))
        if kind not in seen:
            seen.add(kind)
            args = tuple(map(_with_variable_rows, args))  # type: ignore[assignment]
        result: _R = compiled[0](*args, **kwargs)
        return result

    return call


def _is_on_gpu(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_cuda


def _describe(value: object) -> object:
    """Return everything but the number of rows that torch.compile may recompile for."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() < 2:
        return value.dtype, value.shape
    *copies, rows, width = value.shape
    return value.dtype, *copies, rows > 1, width, value.stride()[-2:]


def _with_variable_rows(value: object) -> object:
    """Return a view whose number of rows is marked dynamic, except 1, which torch.compile always specialises."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[-2] < 2:
        return value
    view = value.view_as(value)  # the mark would stay on the caller's tensor
    torch._dynamo.mark_dynamic(view, view.dim() - 2, hint_override=_ASSUMED_ROWS)
    return view


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@fused_sum
def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: weight * x / rms(x). Shapes: (T, H), (H,) -> (T, H)."""
    wide = x.float()
    return weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)


def drop_threshold(dropout: float) -> int:
    """Return the 16-bit number below which `draw_keep` drops."""
    return int(dropout * _DRAWS)


@fused
def draw_keep(seed: Tensor, x: Tensor, num_copies: int, threshold: int) -> Tensor:
    """Return dropout masks, a pure function of seed, row, copy and column: recomputed in the backward pass instead of stored.

    Appended rows, such as padding, do not change the masks of other rows, and CPU and GPU give the same masks. The random bits
    are MurmurHash3's finaliser (Appleby, public domain) over a counter, more uniform than dropout needs; one number serves two
    copies. The masks of all copies are computed at once: random bits, not memory, would otherwise bound the steps that use them.

    Shapes: x (T, H), read for its shape alone.

    Args:
        seed: () int32.
        num_copies: at most 8.
        threshold: `drop_threshold` of the dropout.

    Returns:
        (T, H) uint8; bit c is set, with probability 1 - dropout, where copy c keeps.
    """
    num_rows, width = x.shape
    rows = torch.arange(num_rows, dtype=torch.int32, device=seed.device)[:, None]
    columns = torch.arange(width, dtype=torch.int32, device=seed.device)[None]
    # Mixed twice with the seed between: mixed once, another seed would give the same bits in another order.
    bits = _mix(_mix((rows * width + columns) ^ seed) + seed)
    keep = torch.zeros_like(bits)
    for copy in range(num_copies):
        if copy and copy % 2 == 0:
            bits = _mix(bits + 0x3779B97F)
        keep = keep | ((((bits >> 16 * (copy % 2)) & 0xFFFF) >= threshold).int() << copy)
    return keep.to(torch.uint8)


def split_keep(keep: Tensor, num_copies: int) -> Tensor:
    """Return each copy's mask from `draw_keep`'s. Shapes: (T, H) uint8 -> (k, T, H) bool."""
    copies = torch.arange(num_copies, dtype=torch.uint8, device=keep.device)[:, None, None]
    return ((keep[None] >> copies) & 1).bool()


def _mix(bits: Tensor) -> Tensor:
    """MurmurHash3's finaliser on wrapping int32; the masks make the shifts logical."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return bits ^ ((bits >> 16) & 0xFFFF)


@fused_sum
def normalise_and_drop(
    x: Tensor, weight: Tensor, eps: float, keep: Tensor, num_copies: int, threshold: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm, and k copies of its output under `draw_keep`'s masks. Shapes: (T, H), (H,) -> (T, H), (k, T, H)."""
    wide = x.float()
    out = weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)
    return out, torch.where(split_keep(keep, num_copies), out / (1 - threshold / _DRAWS), 0.0).to(x.dtype)


def _norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """d(loss)/dx of RMSNorm in float32, from d(loss)/d(output)."""
    wide, scaled = x.float(), grad * weight.float()
    inverse = _inverse_rms(wide, eps)
    unit = wide * inverse
    return inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))


@fused_sum
def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """Gradient through RMSNorm plus the residual path's. Shapes: all (T, H) but weight (H,)."""
    return (residual.float() + _norm_gradient(grad.float(), x, weight, eps)).to(x.dtype)


@fused_sum
def normalise_and_drop_backward(
    grad: Tensor, dropped: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor, keep: Tensor, threshold: int
) -> Tensor:
    """As `normalise_backward`, with the gradients `dropped` (k, T, H) of the k dropped copies."""
    keeps = split_keep(keep, dropped.shape[0])
    total = grad.float() + torch.where(keeps, dropped.float() / (1 - threshold / _DRAWS), 0.0).sum(0)
    return (residual.float() + _norm_gradient(total, x, weight, eps)).to(x.dtype)


@fused
def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding; with -sine its gradient. Shapes: (T, h, d), (T, d), (T, d) -> (T, h, d)."""
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    cosine, sine = cosine[:, None, :half].float(), sine[:, None, :half].float()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)


@fused
def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU: silu(gate) * up. Shapes: (T, 2 I) -> (T, I)."""
    first, second = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(first.float()).to(gate_up.dtype) * second


@fused
def gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of SwiGLU. Shapes: (T, I), (T, 2 I) -> (T, 2 I)."""
    first, second = gate_up.float().chunk(2, -1)
    sigmoid = torch.sigmoid(first)
    wide = grad.float()
    slope = sigmoid * (1 + first * (1 - sigmoid))
    return torch.cat([wide * second * slope, wide * first * sigmoid], -1).to(gate_up.dtype)
