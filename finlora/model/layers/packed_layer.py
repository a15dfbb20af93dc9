"""Forward and backward pass of one Llama layer on packed rows, with LoRA on q, k and v.

Shapes: T rows of a pack, S key rows, N labelled rows, H hidden, h heads, g key-value heads of width d, I intermediate,
k adapted projections of rank r. D is a dropout mask of each projection's own:

    n = norm(x);  q, k, v = n W^T + (alpha / r) D(n) A^T B^T;  q, k rotated
    y = x + attention(q, k, v) Wo^T;  z = y + (silu(m Wg^T) * (m Wu^T)) Wd^T with m = norm(y)

Families with a norm of heads have it on q and k between product and rotation; their biases and factors are in the weights
(finlora/model/layers/frozen_linear.py) and in the rotary tables.

The base is frozen, so the inputs of its products are not saved for the backward pass. `Recompute` says what the backward pass
computes again: nothing, gate and up projection, or the layer from its input. In the last layer only the labelled rows are
queries, and only they go through the MLP.

finlora/stage/stage.py writes the same layer out for serving, with other kernels and without a backward pass: there queries meet
the KV cache, and each row has an adapter of its own on any projection.

Source: transformers' modeling_llama and PEFT's LoRA layers; tests compare loss and gradients with theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finlora.data.encode import IGNORED
from finlora.data.packing import Segments
from finlora.model.layers.attention import attend, attend_backward
from finlora.model.layers.elementwise import (
    draw_keep,
    drop_threshold,
    gate,
    gate_backward,
    normalise,
    normalise_and_drop,
    normalise_and_drop_backward,
    normalise_backward,
    normalise_heads,
    normalise_heads_backward,
    rotate,
)
from finlora.model.layers.frozen_model import Layer
from finlora.model.memory.packed_memory import HEAD_CHUNK, Recompute


@dataclass(slots=True)
class Kept:
    """Tensors of a layer saved for its backward pass."""

    x: Tensor
    qkv: Tensor | None = None
    """Rotated q, rotated k and v, (T, (h + 2 g) d)."""
    heads: Tensor | None = None
    """q and k before their norm (T, h + g, d), in layers that have one."""
    low: Tensor | None = None
    """D(n) A^T, (k, T, r)."""
    attended: Tensor | None = None
    log_sum: Tensor | None = None
    y: Tensor | None = None
    gate_up: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LayerContext:
    """Inputs that layers of a pass share. The last layer has a context of its own, with queries at `rows` only."""

    segments: Segments
    rows: Tensor | None
    cosine: Tensor
    sine: Tensor
    recompute: Recompute


def run_layer(x: Tensor, layer: Layer, context: LayerContext, seed: Tensor | None) -> tuple[Tensor, Kept]:
    """Return the layer's output (T, H), or (N, H) where the context has rows, and the tensors for its backward pass.

    Args:
        seed: () int32 of this layer's dropout; None: no dropout.
    """
    kept = Kept(x)
    z = _run_mlp(_run_attention(kept, layer, context, seed), kept, layer)
    if context.recompute == "layer":
        return z, Kept(x)
    if context.recompute == "mlp":
        kept.gate_up = None
    return z, kept


def layer_backward(
    grad: Tensor, kept: Kept, layer: Layer, context: LayerContext, seed: Tensor | None, *, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of x (None unless needed) and, in float32, of A, B, A, B, ...; `kept` is consumed."""
    if kept.y is None:
        _run_attention(kept, layer, context, seed)
    return _attention_backward(_mlp_backward(grad, kept, layer), kept, layer, context, seed, needs_x=needs_x)


def _run_attention(kept: Kept, layer: Layer, context: LayerContext, seed: Tensor | None) -> Tensor:
    """Return y, the output of the attention block; fills `kept` but for gate_up."""
    x = kept.x
    num_heads, num_groups, width = layer.heads
    normed, dropped = _normalise(x, layer, _make_masks(x, layer, seed))
    qkv = layer.qkv.forward(normed)
    if layer.lora:
        down = _stack_down(layer, x.dtype)
        kept.low = dropped @ down.transpose(1, 2)
        for lora, low in zip(layer.lora, kept.low, strict=True):
            qkv[:, lora.columns].addmm_(low, lora.up.to(x.dtype).t(), alpha=lora.scale)
    del normed, dropped
    rotated = qkv[:, : (num_heads + num_groups) * width].view(x.shape[0], -1, width)
    if layer.head_norms is not None:
        kept.heads = rotated.clone()
        normalise_heads(rotated, layer.head_norms, layer.eps)
    rotated.copy_(rotate(rotated, context.cosine, context.sine))
    kept.qkv = qkv
    query, key, value = _query_key_value(kept, layer, context)
    kept.attended, kept.log_sum = attend(query, key, value, context.segments)
    residual = x if context.rows is None else x[context.rows]
    kept.y = layer.out.forward(kept.attended.flatten(1), residual)
    return kept.y


def _attention_backward(
    grad: Tensor, kept: Kept, layer: Layer, context: LayerContext, seed: Tensor | None, *, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of x (None unless needed) and of A, B, A, B, ..."""
    x = kept.x
    num_heads, _, width = layer.heads
    query, key, value = _query_key_value(kept, layer, context)
    assert kept.attended is not None
    assert kept.log_sum is not None
    grad_attended = layer.out.backward(grad).view_as(kept.attended)
    grads = attend_backward(grad_attended, query, key, value, kept.attended, kept.log_sum, context.segments)
    grad_query = grads[0]
    if context.rows is not None:
        grad_query = grad_query.new_zeros(x.shape[0], num_heads, width).index_copy_(0, context.rows, grad_query)
    grad_key, grad_value = (_gather_backward(part, context.segments) for part in grads[1:])
    turned = rotate(torch.cat([grad_query, grad_key], 1), context.cosine, -context.sine)
    if layer.head_norms is not None:
        assert kept.heads is not None
        turned = normalise_heads_backward(turned, kept.heads, layer.head_norms, layer.eps)
        kept.heads = None
    grad_qkv = torch.cat([turned, grad_value], 1).view(x.shape[0], -1)
    del grads, grad_query, grad_key, grad_value, turned, query, key, value
    kept.qkv = kept.attended = None
    gradients: list[Tensor] = []
    lows = []
    keep = _make_masks(x, layer, seed)
    _, dropped = _normalise(x, layer, keep)
    for index, lora in enumerate(layer.lora):
        part = grad_qkv[:, lora.columns]
        assert kept.low is not None
        low = (part @ lora.up.to(x.dtype)).mul_(lora.scale)
        grad_up = (part.t() @ kept.low[index]).float().mul_(lora.scale)
        gradients += [(low.t() @ dropped[index]).float(), grad_up]
        lows.append(low)
    if not needs_x:
        return None, gradients
    residual = grad if context.rows is None else torch.zeros_like(x).index_copy_(0, context.rows, grad)
    grad_normed = layer.qkv.backward(grad_qkv)
    if not lows:
        return normalise_backward(grad_normed, x, layer.first_norm, layer.eps, residual), gradients
    grad_dropped = torch.stack(lows) @ _stack_down(layer, x.dtype)
    if keep is None:
        grad_normed = grad_normed + grad_dropped.sum(0)
        return normalise_backward(grad_normed, x, layer.first_norm, layer.eps, residual), gradients
    grad_x = normalise_and_drop_backward(
        grad_normed, grad_dropped, x, layer.first_norm, layer.eps, residual, keep, drop_threshold(layer.dropout)
    )
    return grad_x, gradients


def _run_mlp(y: Tensor, kept: Kept, layer: Layer) -> Tensor:
    kept.gate_up = layer.gate_up.forward(normalise(y, layer.second_norm, layer.eps))
    return layer.down.forward(gate(kept.gate_up), y)


def _mlp_backward(grad: Tensor, kept: Kept, layer: Layer) -> Tensor:
    assert kept.y is not None
    if kept.gate_up is None:
        kept.gate_up = layer.gate_up.forward(normalise(kept.y, layer.second_norm, layer.eps))
    inner = gate_backward(layer.down.backward(grad), kept.gate_up)
    kept.gate_up = None
    return normalise_backward(layer.gate_up.backward(inner), kept.y, layer.second_norm, layer.eps, grad)


def _query_key_value(kept: Kept, layer: Layer, context: LayerContext) -> Sequence[Tensor]:
    """Split `qkv` into queries at the context's rows, and keys and values in the segments' order."""
    assert kept.qkv is not None
    num_heads, num_groups, width = layer.heads
    query, key, value = kept.qkv.view(kept.x.shape[0], -1, width).split([num_heads, num_groups, num_groups], 1)
    if context.rows is not None:
        query = query[context.rows]
    if context.segments.key_rows is not None:
        key, value = key[context.segments.key_rows], value[context.segments.key_rows]
    return query, key, value


def _gather_backward(grad: Tensor, segments: Segments) -> Tensor:
    """Sum the gradients of the prefix's copies, in float32 and in a fixed order. Shapes: (S, g, d) -> (T, g, d)."""
    if segments.prefix_slots is None or segments.own_slots is None:
        return grad
    return torch.cat([grad[segments.prefix_slots].sum(0, dtype=torch.float32).to(grad.dtype), grad[segments.own_slots]])


def _make_masks(x: Tensor, layer: Layer, seed: Tensor | None) -> Tensor | None:
    """Return a layer's dropout masks (T, H), the same in both passes; None without dropout."""
    if seed is None or not layer.lora:
        return None
    return draw_keep(seed, x, len(layer.lora), drop_threshold(layer.dropout))


def _normalise(x: Tensor, layer: Layer, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return norm(x) and its dropped copies (k, T, H)."""
    if keep is not None:
        return normalise_and_drop(x, layer.first_norm, layer.eps, keep, len(layer.lora), drop_threshold(layer.dropout))
    normed = normalise(x, layer.first_norm, layer.eps)
    return normed, normed.expand(len(layer.lora), -1, -1)


def _stack_down(layer: Layer, dtype: torch.dtype) -> Tensor:
    """Shapes: k of (r, H) -> (k, r, H)."""
    return torch.stack([lora.down for lora in layer.lora]).to(dtype)


def answer_loss(
    x: Tensor, norm: Tensor, eps: float, head: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Final norm, output head and cross entropy summed over the labelled rows, HEAD_CHUNK rows at a time.

    Shapes: x (N, H), norm (H,), head (V, H), targets (N,), weights (N,) or None -> loss () float32, its gradient (N, H).
    """
    normed = normalise(x, norm, eps)
    grads, total = [], torch.zeros((), device=x.device)
    chunks = normed.split(HEAD_CHUNK)
    scales = [None] * len(chunks) if weights is None else weights[:, None].split(HEAD_CHUNK)
    for rows, wanted, scale in zip(chunks, targets.split(HEAD_CHUNK), scales, strict=True):
        is_real, wanted = (wanted != IGNORED)[:, None], wanted.clamp(min=0)[:, None]
        log_probs = torch.log_softmax((rows @ head.t()).float(), -1)
        picked = torch.where(is_real, log_probs.gather(1, wanted), 0.0)
        total = total - (picked if scale is None else picked * scale).sum()
        slope = log_probs.exp_().scatter_add_(1, wanted, log_probs.new_full(wanted.shape, -1.0)).mul_(is_real)
        if scale is not None:
            slope.mul_(scale)
        grads.append(slope.to(x.dtype) @ head)
    return total, normalise_backward(torch.cat(grads), x, norm, eps, torch.zeros_like(x))
