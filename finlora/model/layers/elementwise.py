"""Elementwise steps of a Llama layer and their gradients, in plain torch; on a GPU each is one Triton kernel.

The kernels are in finlora/model/rowwise/ and not made by torch.compile: importing it, tracing each step and compiling it for
each kind of length would take most of a short command's time, and again in each process.

Shapes: T rows, H hidden, I intermediate, h heads of width d, k adapted projections. Reductions run in float32 and results
are rounded to the input's type at the same points as in transformers' LlamaRMSNorm, LlamaMLP and apply_rotary_pos_emb.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finlora.model.kernels import launch

_DRAWS = 2**16
"""Range of the 16-bit random numbers of a mask."""


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: weight * x / rms(x). Shapes: (T, H), (H,) -> (T, H)."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.norm_steps import normalise_rows

        return normalise_rows(x, weight, eps)
    wide = x.float()
    return weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)


def drop_threshold(dropout: float) -> int:
    """Return the 16-bit number below which `draw_keep` drops."""
    return int(dropout * _DRAWS)


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
    if launch.takes_kernels(x):
        from finlora.model.rowwise.elementwise_steps import draw_keep_rows

        return draw_keep_rows(seed, num_rows, width, num_copies, threshold)
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


def _kept_share(threshold: int) -> float:
    """Return the probability with which `draw_keep` keeps a number."""
    return 1 - threshold / _DRAWS


def split_keep(keep: Tensor, num_copies: int) -> Tensor:
    """Return each copy's mask from `draw_keep`'s. Shapes: (T, H) uint8 -> (k, T, H) bool."""
    copies = torch.arange(num_copies, dtype=torch.uint8, device=keep.device)[:, None, None]
    return ((keep[None] >> copies) & 1).bool()


def _mix(bits: Tensor) -> Tensor:
    """MurmurHash3's finaliser on wrapping int32; the masks make the shifts logical."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * -2048144789  # 0x85EBCA6B
    bits = (bits ^ ((bits >> 13) & 0x7FFFF)) * -1028477387  # 0xC2B2AE35
    return bits ^ ((bits >> 16) & 0xFFFF)


def normalise_and_drop(
    x: Tensor, weight: Tensor, eps: float, keep: Tensor, num_copies: int, threshold: int
) -> tuple[Tensor, Tensor]:
    """RMSNorm, and k copies of its output under `draw_keep`'s masks. Shapes: (T, H), (H,) -> (T, H), (k, T, H)."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.norm_steps import normalise_and_drop_rows

        return normalise_and_drop_rows(x, weight, eps, keep, num_copies, _kept_share(threshold))
    wide = x.float()
    out = weight * (wide * _inverse_rms(wide, eps)).to(x.dtype)
    return out, torch.where(split_keep(keep, num_copies), out / _kept_share(threshold), 0.0).to(x.dtype)


def drop(x: Tensor, keep: Tensor, threshold: int) -> Tensor:
    """Dropout under the first of `draw_keep`'s masks. Shapes: (T, K), (T, K) -> (T, K)."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.dropout_steps import drop_rows

        return drop_rows(x, keep, _kept_share(threshold))
    return torch.where(split_keep(keep, 1)[0], x / _kept_share(threshold), 0.0).to(x.dtype)


def drop_backward(grad: Tensor, dropped: Tensor, keep: Tensor, threshold: int) -> Tensor:
    """Gradient of `drop`'s input from that of its output, `dropped`, plus another gradient of the input. Shapes: all (T, K)."""
    if launch.takes_kernels(grad):
        from finlora.model.rowwise.dropout_steps import drop_backward_rows

        return drop_backward_rows(grad, dropped, keep, _kept_share(threshold))
    return _add_dropped(grad, dropped[None], keep, threshold).to(grad.dtype)


def _add_dropped(grad: Tensor, dropped: Tensor, keep: Tensor, threshold: int) -> Tensor:
    """Return in float32 the gradient of an input from that of its k dropped copies, plus another one of the input."""
    keeps = split_keep(keep, dropped.shape[0])
    return grad.float() + torch.where(keeps, dropped.float() / _kept_share(threshold), 0.0).sum(0)


def _norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """d(loss)/dx of RMSNorm in float32, from d(loss)/d(output)."""
    wide, scaled = x.float(), grad * weight.float()
    inverse = _inverse_rms(wide, eps)
    unit = wide * inverse
    return inverse * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))


def normalise_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor) -> Tensor:
    """Gradient through RMSNorm plus the residual path's. Shapes: all (T, H) but weight (H,)."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.norm_steps import normalise_backward_rows

        return normalise_backward_rows(grad, x, weight, eps, residual)
    return (residual.float() + _norm_gradient(grad.float(), x, weight, eps)).to(x.dtype)


def normalise_and_drop_backward(
    grad: Tensor, dropped: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor, keep: Tensor, threshold: int
) -> Tensor:
    """As `normalise_backward`, with the gradients `dropped` (k, T, H) of the k dropped copies."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.norm_steps import normalise_and_drop_backward_rows

        share = _kept_share(threshold)
        return normalise_and_drop_backward_rows(grad, dropped, x, weight, eps, residual, keep, share)
    total = _add_dropped(grad, dropped, keep, threshold)
    return (residual.float() + _norm_gradient(total, x, weight, eps)).to(x.dtype)


def normalise_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of the first n heads of each row, in place. Shapes: x (T, m, d) with m >= n, weight (n, d) -> x."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.norm_steps import normalise_heads_rows

        return normalise_heads_rows(x, weight, eps)
    heads = x[:, : len(weight)]
    wide = heads.float()
    heads.copy_(weight * (wide * _inverse_rms(wide, eps)).to(x.dtype))
    return x


def normalise_heads_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gradient through the RMSNorm of heads, in place. Shapes: grad and x (T, n, d), weight (n, d) -> grad."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.norm_steps import normalise_heads_backward_rows

        return normalise_heads_backward_rows(grad, x, weight, eps)
    return grad.copy_(_norm_gradient(grad.float(), x, weight, eps))


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary position embedding; with -sine its gradient. Shapes: (T, h, d), (T, d), (T, d) -> (T, h, d)."""
    if launch.takes_kernels(x):
        from finlora.model.rowwise.elementwise_steps import rotate_rows

        return rotate_rows(x, cosine, sine)
    half = x.shape[-1] // 2
    first, second = x[..., :half].float(), x[..., half:].float()
    cosine, sine = cosine[:, None, :half].float(), sine[:, None, :half].float()
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1).to(x.dtype)


def gate(gate_up: Tensor) -> Tensor:
    """SwiGLU: silu(gate) * up. Shapes: (T, 2 I) -> (T, I)."""
    if launch.takes_kernels(gate_up):
        from finlora.model.rowwise.elementwise_steps import gate_rows

        return gate_rows(gate_up)
    first, second = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(first.float()).to(gate_up.dtype) * second


def gate_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of SwiGLU. Shapes: (T, I), (T, 2 I) -> (T, 2 I)."""
    if launch.takes_kernels(grad):
        from finlora.model.rowwise.elementwise_steps import gate_backward_rows

        return gate_backward_rows(grad, gate_up)
    first, second = gate_up.float().chunk(2, -1)
    sigmoid = torch.sigmoid(first)
    wide = grad.float()
    slope = sigmoid * (1 + first * (1 - sigmoid))
    return torch.cat([wide * second * slope, wide * first * sigmoid], -1).to(gate_up.dtype)


def gate_and_drop(gate_up: Tensor, keep: Tensor, threshold: int) -> tuple[Tensor, Tensor]:
    """SwiGLU, and a copy of it under the first of `draw_keep`'s masks. Shapes: (T, 2 I), (T, I) -> (T, I), (T, I)."""
    if launch.takes_kernels(gate_up):
        from finlora.model.rowwise.dropout_steps import gate_and_drop_rows

        return gate_and_drop_rows(gate_up, keep, _kept_share(threshold))
    out = gate(gate_up)
    return out, drop(out, keep, threshold)


def gate_and_drop_backward(
    grad: Tensor, dropped: Tensor, gate_up: Tensor, keep: Tensor, threshold: int
) -> tuple[Tensor, Tensor]:
    """As `gate_backward`, with the gradient `dropped` (T, I) of the dropped copy; returns the copy itself too, (T, I)."""
    if launch.takes_kernels(grad):
        from finlora.model.rowwise.dropout_steps import gate_and_drop_backward_rows

        return gate_and_drop_backward_rows(grad, dropped, gate_up, keep, _kept_share(threshold))
    total = _add_dropped(grad, dropped[None], keep, threshold)
    return gate_backward(total, gate_up), gate_and_drop(gate_up, keep, threshold)[1]
