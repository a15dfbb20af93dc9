"""Forward and backward pass of one Llama layer on packed rows, with LoRA on any of its projections.

Shapes: T rows of a pack, S key rows, N labelled rows, H hidden, h heads, g key-value heads of width d, I intermediate,
k adapted projections of a product, of rank r. P(x, W) is a product with its updates (lora_gradients.py):

    n = norm(x);  q, k, v = P(n, Wq, Wk, Wv);  q, k rotated
    y = x + P(attention(q, k, v), Wo);  m = norm(y);  g, u = P(m, Wg, Wu);  z = y + P(silu(g) * u, Wd)

Families with a norm of heads have it on q and k between product and rotation; their biases and factors are in the weights
(finlora/model/layers/frozen_linear.py) and in the rotary tables.

The base is frozen, so the inputs of its products are not saved for the backward pass: an update's input is computed again from
what is saved. `Recompute` says what else the backward pass computes again: nothing, gate and up projection, or the layer from its
input. In the last layer only the labelled rows are queries, and only they go through o and the MLP.

finlora/stage/stage.py writes the same layer out for serving, with other kernels and without a backward pass: there queries meet
the KV cache, and each row has an adapter of its own on any projection.

Source: transformers' modeling_llama and PEFT's LoRA layers; tests compare loss and gradients with theirs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finlora.data.encode import IGNORED
from finlora.data.packing import Segments
from finlora.formula.llama import Product
from finlora.model.layers.attention import attend, attend_backward
from finlora.model.layers.elementwise import (
    draw_keep,
    drop,
    drop_backward,
    drop_threshold,
    gate,
    gate_and_drop,
    gate_and_drop_backward,
    gate_backward,
    normalise,
    normalise_and_drop,
    normalise_and_drop_backward,
    normalise_backward,
    normalise_heads,
    normalise_heads_backward,
    rotate,
)
from finlora.model.layers.frozen_linear import FrozenWeight
from finlora.model.layers.frozen_model import Layer
from finlora.model.layers.lora_gradients import (
    Lows,
    add_input_gradient,
    add_lows,
    add_update,
    add_updates,
    dropped_gradient,
    dropped_gradient_of_one,
    low_gradient,
    multiply_down_of_one,
    parameter_gradients,
    updates_backward,
)
from finlora.model.memory.packed_memory import HEAD_CHUNK, Recompute

Seeds = Mapping[Product, Tensor] | None
"""() int32 of the dropout of each adapted product of a layer; None: no dropout."""


@dataclass(slots=True)
class Kept:
    """Tensors of a layer saved for its backward pass."""

    x: Tensor
    qkv: Tensor | None = None
    """Rotated q, rotated k and v, (T, (h + 2 g) d)."""
    heads: Tensor | None = None
    """q and k before their norm (T, h + g, d), in layers that have one."""
    attended: Tensor | None = None
    log_sum: Tensor | None = None
    y: Tensor | None = None
    gate_up: Tensor | None = None
    lows: dict[Product, Lows] = field(default_factory=dict)
    """D(x) A^T of each adapted product."""


@dataclass(frozen=True, slots=True)
class LayerContext:
    """Inputs that layers of a pass share. The last layer has a context of its own, with queries at `rows` only."""

    segments: Segments
    rows: Tensor | None
    cosine: Tensor
    sine: Tensor
    recompute: Recompute


def run_layer(x: Tensor, layer: Layer, context: LayerContext, seeds: Seeds) -> tuple[Tensor, Kept]:
    """Return the layer's output (T, H), or (N, H) where the context has rows, and the tensors for its backward pass."""
    kept = Kept(x)
    z = _run_mlp(_run_attention(kept, layer, context, seeds), kept, layer, seeds)
    if context.recompute == "layer":
        return z, Kept(x)
    if context.recompute == "mlp":
        kept.gate_up = None
    return z, kept


def layer_backward(
    grad: Tensor, kept: Kept, layer: Layer, context: LayerContext, seeds: Seeds, *, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of x (None unless needed) and, in float32, of A, B, A, B, ... in the order of the layer's products;
    `kept` is consumed."""
    if kept.y is None:
        _run_attention(kept, layer, context, seeds)
    needs_y = needs_x or bool(layer.lora["qkv"] or layer.lora["out"])
    grad_y, mlp_gradients = _mlp_backward(grad, kept, layer, seeds, needs_y=needs_y)
    if grad_y is None:
        return None, mlp_gradients
    grad_x, gradients = _attention_backward(grad_y, kept, layer, context, seeds, needs_x=needs_x)
    return grad_x, gradients + mlp_gradients


def _run_attention(kept: Kept, layer: Layer, context: LayerContext, seeds: Seeds) -> Tensor:
    """Return y, the output of the attention block; fills `kept` but for the MLP's tensors."""
    x = kept.x
    num_heads, num_groups, width = layer.heads
    qkv = _multiply_normed(x, layer.first_norm, layer.qkv, "qkv", kept, layer, seeds)
    rotated = qkv[:, : (num_heads + num_groups) * width].view(x.shape[0], -1, width)
    if layer.head_norms is not None:
        kept.heads = rotated.clone()
        normalise_heads(rotated, layer.head_norms, layer.eps)
    rotated.copy_(rotate(rotated, context.cosine, context.sine))
    kept.qkv = qkv
    query, key, value = _query_key_value(kept, layer, context)
    kept.attended, kept.log_sum = attend(query, key, value, context.segments)
    attended, residual = kept.attended.flatten(1), x if context.rows is None else x[context.rows]
    kept.y = layer.out.forward(attended, residual)
    for update in layer.lora["out"]:
        dropped = _drop(attended, _make_masks(attended, layer, "out", seeds), layer)
        kept.lows["out"] = add_update(kept.y, dropped, update)
    return kept.y


def _attention_backward(
    grad: Tensor, kept: Kept, layer: Layer, context: LayerContext, seeds: Seeds, *, needs_x: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of x (None unless needed) and of A, B, A, B, ..."""
    x = kept.x
    num_heads, _, width = layer.heads
    query, key, value = _query_key_value(kept, layer, context)
    assert kept.attended is not None
    assert kept.log_sum is not None
    grad_attended, gradients = _out_backward(grad, kept.attended.flatten(1), kept, layer, seeds)
    if not needs_x and not layer.lora["qkv"]:
        return None, gradients
    grad_attended = grad_attended.view_as(kept.attended)
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
    keep = _make_masks(x, layer, "qkv", seeds)
    low_grads, own_gradients = _normed_updates_backward(grad_qkv, x, layer.first_norm, "qkv", kept, layer, keep)
    gradients = own_gradients + gradients
    if not needs_x:
        return None, gradients
    residual = grad if context.rows is None else torch.zeros_like(x).index_copy_(0, context.rows, grad)
    grad_normed = layer.qkv.backward(grad_qkv)
    return _norm_backward(grad_normed, low_grads, x, layer.first_norm, residual, "qkv", layer, keep), gradients


def _out_backward(
    grad: Tensor, attended: Tensor, kept: Kept, layer: Layer, seeds: Seeds
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of the attention output, which is o's input, and of o's A and B."""
    grad_attended = layer.out.backward(grad)
    if not layer.lora["out"]:
        return grad_attended, []
    (update,) = layer.lora["out"]
    keep = _make_masks(attended, layer, "out", seeds)
    (low_grad,), gradients = updates_backward(
        grad, _drop(attended, keep, layer)[None], kept.lows["out"], layer.lora["out"]
    )
    if keep is None:
        return add_input_gradient(grad_attended, low_grad, update), gradients
    grad_dropped = dropped_gradient_of_one(low_grad, update)
    return drop_backward(grad_attended, grad_dropped, keep, drop_threshold(layer.dropout)), gradients


def _run_mlp(y: Tensor, kept: Kept, layer: Layer, seeds: Seeds) -> Tensor:
    kept.gate_up = _multiply_normed(y, layer.second_norm, layer.gate_up, "gate_up", kept, layer, seeds)
    if not layer.lora["down"]:
        return layer.down.forward(gate(kept.gate_up), y)
    (update,) = layer.lora["down"]
    keep = _make_gated_masks(kept.gate_up, layer, seeds)
    if keep is None:
        gated = dropped = gate(kept.gate_up)
    else:
        gated, dropped = gate_and_drop(kept.gate_up, keep, drop_threshold(layer.dropout))
    z = layer.down.forward(gated, y)
    kept.lows["down"] = add_update(z, dropped, update)
    return z


def _mlp_backward(
    grad: Tensor, kept: Kept, layer: Layer, seeds: Seeds, *, needs_y: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """Return the gradients of y (None unless needed) and of A, B, A, B, ..."""
    y = kept.y
    assert y is not None
    if kept.gate_up is None:
        kept.gate_up = _multiply_normed(y, layer.second_norm, layer.gate_up, "gate_up", kept, layer, seeds)
    inner, gradients = _gated_backward(grad, kept, layer, seeds)
    kept.gate_up = None
    keep = _make_masks(y, layer, "gate_up", seeds)
    low_grads, own_gradients = _normed_updates_backward(inner, y, layer.second_norm, "gate_up", kept, layer, keep)
    gradients = own_gradients + gradients
    if not needs_y:
        return None, gradients
    grad_normed = layer.gate_up.backward(inner)
    return _norm_backward(grad_normed, low_grads, y, layer.second_norm, grad, "gate_up", layer, keep), gradients


def _gated_backward(grad: Tensor, kept: Kept, layer: Layer, seeds: Seeds) -> tuple[Tensor, list[Tensor]]:
    """Return the gradients of gate and up, (T, 2 I), and of down's A and B."""
    assert kept.gate_up is not None
    grad_gated = layer.down.backward(grad)
    if not layer.lora["down"]:
        return gate_backward(grad_gated, kept.gate_up), []
    (update,) = layer.lora["down"]
    keep = _make_gated_masks(kept.gate_up, layer, seeds)
    low_grad = low_gradient(grad, update)
    if keep is None:
        inner = gate_backward(add_input_gradient(grad_gated, low_grad, update), kept.gate_up)
        dropped = gate(kept.gate_up)
    else:
        grad_dropped, threshold = dropped_gradient_of_one(low_grad, update), drop_threshold(layer.dropout)
        inner, dropped = gate_and_drop_backward(grad_gated, grad_dropped, kept.gate_up, keep, threshold)
    lows = kept.lows.get("down")
    low = multiply_down_of_one(dropped, update) if lows is None else lows[0]
    return inner, parameter_gradients(grad, dropped, low, low_grad, update)


def _multiply_normed(
    x: Tensor, norm: Tensor, weight: FrozenWeight, product: Product, kept: Kept, layer: Layer, seeds: Seeds
) -> Tensor:
    """Return norm(x) W^T with the product's updates, whose `low` is kept, or taken from there."""
    updates, lows = layer.lora[product], kept.lows.get(product)
    if not updates or lows is not None:
        out = weight.forward(normalise(x, norm, layer.eps))
        if lows is not None:
            add_lows(out, lows, updates)
        return out
    normed, dropped = _normalise(x, norm, product, layer, _make_masks(x, layer, product, seeds))
    out = weight.forward(normed)
    kept.lows[product] = add_updates(out, dropped, updates)
    return out


def _normed_updates_backward(
    grad: Tensor, x: Tensor, norm: Tensor, product: Product, kept: Kept, layer: Layer, keep: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of each `low` of a product of norm(x), and of A, B, A, B, ..."""
    if not layer.lora[product]:
        return [], []
    _, dropped = _normalise(x, norm, product, layer, keep)
    return updates_backward(grad, dropped, kept.lows[product], layer.lora[product])


def _norm_backward(
    grad_normed: Tensor,
    low_grads: Sequence[Tensor],
    x: Tensor,
    norm: Tensor,
    residual: Tensor,
    product: Product,
    layer: Layer,
    keep: Tensor | None,
) -> Tensor:
    """Return the gradient of x from those of norm(x), of each `low` and of the residual path."""
    if not low_grads:
        return normalise_backward(grad_normed, x, norm, layer.eps, residual)
    grad_dropped = dropped_gradient(low_grads, layer.lora[product])
    if keep is None:
        return normalise_backward(grad_normed + grad_dropped.sum(0), x, norm, layer.eps, residual)
    threshold = drop_threshold(layer.dropout)
    return normalise_and_drop_backward(grad_normed, grad_dropped, x, norm, layer.eps, residual, keep, threshold)


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


def _make_masks(x: Tensor, layer: Layer, product: Product, seeds: Seeds) -> Tensor | None:
    """Return the dropout masks (T, K) of a product's input, the same in both passes; None without dropout or updates.

    Args:
        x: (T, K), read for its shape alone.
    """
    if seeds is None or not layer.lora[product]:
        return None
    return draw_keep(seeds[product], x, len(layer.lora[product]), drop_threshold(layer.dropout))


def _make_gated_masks(gate_up: Tensor, layer: Layer, seeds: Seeds) -> Tensor | None:
    """As `_make_masks`, for the input of down. Shapes: (T, 2 I) -> (T, I)."""
    return _make_masks(gate_up[:, : gate_up.shape[1] // 2], layer, "down", seeds)


def _drop(x: Tensor, keep: Tensor | None, layer: Layer) -> Tensor:
    return x if keep is None else drop(x, keep, drop_threshold(layer.dropout))


def _normalise(x: Tensor, norm: Tensor, product: Product, layer: Layer, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return norm(x) and its dropped copies (k, T, H)."""
    num_copies = len(layer.lora[product])
    if keep is not None:
        return normalise_and_drop(x, norm, layer.eps, keep, num_copies, drop_threshold(layer.dropout))
    normed = normalise(x, norm, layer.eps)
    return normed, normed.expand(num_copies, -1, -1)


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
