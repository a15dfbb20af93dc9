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


def fused(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Compile a function for CUDA tensors at its first call; on CPU it runs as it is written."""
    compiled: list[Any] = []

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not (isinstance(args[0], Tensor) and args[0].is_cuda):
            return function(*args, **kwargs)
        if not compiled:
            compiled.append(torch.compile(function))
        result: _R = compiled[0](*args, **kwargs)
        return result

    return call


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


@fused
def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: weight * x / rms(x). Shapes: (T, H), (H,) -> (T, H)."""
    wide = x.float()
    return weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)


def drop_threshold(dropout: float) -> int:
    """Return the 31-bit number below which `draw_keep` drops."""
    return int(dropout * 2**31)


def draw_keep(seed: Tensor, num_copies: int, num_rows: int, width: int, threshold: int) -> Tensor:
    """Draw a dropout mask as a pure function of seed, row, copy and column: it is drawn again instead of stored.

    Rows that are appended change nothing, so padding does not either, and CPU and GPU draw the same. The bits are those of
    MurmurHash3's finaliser (Appleby, public domain) over a counter, uniform far beyond what dropout asks for.

    Args:
        seed: () int32.
        threshold: `drop_threshold` of the dropout.

    Returns:
        (num_copies, num_rows, width) bool, True with probability 1 - dropout.
    """
    rows = torch.arange(num_rows, dtype=torch.int32, device=seed.device)[None, :, None]
    copies = torch.arange(num_copies, dtype=torch.int32, device=seed.device)[:, None, None]
    columns = torch.arange(width, dtype=torch.int32, device=seed.device)[None, None]
    bits = ((rows * num_copies + copies) * width + columns) ^ seed
    # Twice, with the seed between: a counter that met the seed once would give other seeds the same bits in another order.
    bits = _mix(_mix(bits) + seed)
    return (bits & 0x7FFFFFFF) >= threshold


def _mix(bits: Tensor) -> Tensor:
    """Scramble int32 numbers, which wrap; the masks make the shifts logical."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return bits ^ ((bits >> 16) & 0xFFFF)


@fused
def normalise_and_drop(
    x: Tensor, weight: Tensor, eps: float, seed: Tensor, num_copies: int, threshold: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm and, of its output, k copies under dropout. Shapes: (T, H), (H,) -> (T, H), (k, T, H)."""
    wide = x.float()
    out = weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)
    keep = draw_keep(seed, num_copies, x.shape[0], x.shape[1], threshold)
    return out, torch.where(keep, out / (1 - threshold / 2**31), 0.0).to(x.dtype)


def _norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """d(loss)/dx of RMSNorm in float32, from d(loss)/d(output)."""
    wide, scaled = x.float(), grad * weight.float()
    inverse = _inverse_rms(wide, eps)
    unit = wide * inverse
    return inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))


@fused
def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """Gradient through RMSNorm, plus that of the residual path around it. Shapes: all (T, H) but weight (H,)."""
    return (residual.float() + _norm_gradient(grad.float(), x, weight, eps)).to(x.dtype)


@fused
def normalise_and_drop_backward(
    grad: Tensor, dropped: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor, seed: Tensor, threshold: int
) -> Tensor:
    """The same with k dropped copies whose gradients are `dropped` (k, T, H)."""
    keep = draw_keep(seed, dropped.shape[0], x.shape[0], x.shape[1], threshold)
    total = grad.float() + torch.where(keep, dropped.float() / (1 - threshold / 2**31), 0.0).sum(0)
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
