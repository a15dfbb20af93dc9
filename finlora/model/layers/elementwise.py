"""The small steps of a Llama layer and their gradients, in plain torch; on a GPU each is compiled into one kernel.

Shapes: T rows, H hidden, I intermediate, h heads of width d, k adapted projections. Reductions run in float32 and results
are rounded to the input's type at the same places as transformers' LlamaRMSNorm, LlamaMLP and apply_rotary_pos_emb.
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
"""Different numbers that a mask is drawn from."""
_ASSUMED_ROWS = 2048
"""Rows that the kernels of `fused_sum` are laid out for."""


def fused(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function for CUDA tensors at its first call; on CPU it runs as it is written."""
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
    """Compile a step that adds up each row into one kernel, whose order of summation depends on the row's width alone.

    torch.compile picks warps and blocks, and with them the order, by the number of rows of the call that it compiles for; it
    compiles again when that number changes, and may pick by timing. A resumed process meets other packs first, so its sums would
    be rounded otherwise: in bfloat16 that changes the loss of 16 examples by up to 0.04 (SmolLM2-135M). So the rows count as
    variable from the first call on, with `_ASSUMED_ROWS` as their number, and nothing is timed.

    Tensors of two and more dimensions have their rows in the last but one.
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
    """Return what torch.compile may compile again for, but the number of rows."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() < 2:
        return value.dtype, value.shape
    *copies, rows, width = value.shape
    return value.dtype, *copies, rows > 1, width, value.stride()[-2:]


def _with_variable_rows(value: object) -> object:
    """Return a view whose rows are marked as variable; one row is always a case of its own for torch.compile."""
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
    """Draw dropout masks as a pure function of seed, row, copy and column: they are drawn again instead of stored.

    Rows that are appended change nothing, so padding does not either, and CPU and GPU draw the same. The bits are those of
    MurmurHash3's finaliser (Appleby, public domain) over a counter, uniform far beyond what dropout asks for; a number serves
    two copies. All copies' masks come at once, since drawing, not memory, is what would bound the steps that use them.

    Shapes: x (T, H), only for its shape.

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
    # Twice, with the seed between: a counter that met the seed once would give other seeds the same bits in another order.
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
    """Scramble int32 numbers, which wrap; the masks make the shifts logical."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return bits ^ ((bits >> 16) & 0xFFFF)


@fused_sum
def normalise_and_drop(
    x: Tensor, weight: Tensor, eps: float, keep: Tensor, num_copies: int, threshold: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm and, of its output, k copies under `draw_keep`'s masks. Shapes: (T, H), (H,) -> (T, H), (k, T, H)."""
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
    """Gradient through RMSNorm, plus that of the residual path around it. Shapes: all (T, H) but weight (H,)."""
    return (residual.float() + _norm_gradient(grad.float(), x, weight, eps)).to(x.dtype)


@fused_sum
def normalise_and_drop_backward(
    grad: Tensor, dropped: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor, keep: Tensor, threshold: int
) -> Tensor:
    """The same with k dropped copies whose gradients are `dropped` (k, T, H)."""
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
