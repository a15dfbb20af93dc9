"""Forecast the memory of a packed training step, as finlora/model/packed_layer.py keeps and frees it.

Legend, all in bytes: e an activation's element (2 in bfloat16), T tokens of a pack, H hidden, Q query width, K key-value width,
I intermediate, h heads, k adapted projections of rank r, L layers, N labelled places, V vocabulary.

Kept for the backward pass, a layer and token:
    always     e H                                      the layer's input
    not layer  e (2 Q + 2 K + H + k r) + 4 h            q, k, v; attention's output and log-sum-exp; y; D(n) A^T
    none       2 e I                                    gate and up
Working memory of the layer at hand, a token, the highest of:
    MLP backward        what was computed again, the gradients of z, of silu(g) u, and of gate and up: e (H + 3 I)
    attention backward  k dropped copies, their masks and their gradients, grad of q, k, v, and four rows of H
    LLM.int8 forward    the int32 product of gate and up beside its rounded result: (4 + e) 2 I
Fixed: weights, adapter, gradients and optimizer; one unpacked weight (4 and 8 bit); the head's chunk, N V (e + 4 + 4 + e).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from finlora.config import RunConfig
from finlora.errors import ResourceError
from finlora.model.activations import element_bytes
from finlora.model.shapes import (
    GIB,
    LlamaShape,
    count_adapter_parameters,
    count_optimizer_bytes,
    count_weight_bytes,
)

Recompute = Literal["none", "mlp", "layer"]

HEAD_CHUNK = 2048
_PACK_OVERHEAD, _UNPACK_OVERHEAD = 100, 300
"""Tokens whose products take as long as reading the weights once, and as unpacking them once: a rule of thumb."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """How a worker trains packed within a given memory."""

    keep_unpacked: bool
    recompute: Recompute
    max_tokens: int
    """Most tokens a pack."""
    peak_gib: float
    """Forecast for a pack of max_tokens, as torch allocates it."""
    cost: float
    """Relative time of a step, in token passes through the layers."""


def count_kept_bytes(shape: LlamaShape, config: RunConfig, recompute: Recompute) -> int:
    """Return what one layer keeps of one token for the backward pass."""
    e, lora = element_bytes(config), config.lora
    kv = shape.num_kv_heads * shape.head_dim
    kept = e * shape.hidden_size
    if recompute == "layer":
        return kept
    low = len(lora.target_modules) * lora.rank
    kept += e * (2 * shape.query_size + 2 * kv + shape.hidden_size + low) + 4 * shape.num_heads
    return kept + (2 * e * shape.intermediate_size if recompute == "none" else 0)


def count_working_bytes(shape: LlamaShape, config: RunConfig, recompute: Recompute) -> int:
    """Return the highest working memory of one token in the layer at hand."""
    e, hidden, inner = element_bytes(config), shape.hidden_size, shape.intermediate_size
    again = count_kept_bytes(shape, config, "none") - count_kept_bytes(shape, config, recompute)
    mlp = again + e * (hidden + 3 * inner)
    copies = len(config.lora.target_modules)
    kv = shape.num_kv_heads * shape.head_dim
    attention = copies * (2 * e + 1) * hidden + 2 * e * (shape.query_size + 2 * kv) + 4 * e * hidden
    int8 = (4 + e) * 2 * inner + 2 * e * hidden if config.model.bits == 8 else 0
    return max(mlp, attention + (again if recompute == "layer" else 0), int8)


def count_fixed_bytes(shape: LlamaShape, config: RunConfig, num_labels: int, *, keep_unpacked: bool) -> int:
    """Return what a step needs whatever the pack's length."""
    e = element_bytes(config)
    weight_element = 2 if config.model.compute_dtype == "bfloat16" else 4
    bits = 16 if keep_unpacked else config.model.bits
    weights = count_weight_bytes(shape, bits, weight_element)
    adapter = 4 * count_adapter_parameters(shape, config.lora)
    optimizer = count_optimizer_bytes(shape, config.lora, config.optim.name, config.train.num_workers)
    largest = shape.hidden_size * shape.intermediate_size
    unpacked = {16: 0, 4: e * largest + largest // 8, 8: 2 * e * largest}[bits]
    head = min(num_labels, HEAD_CHUNK) * shape.vocab_size * (2 * e + 8)
    return weights + adapter + optimizer + max(unpacked, head)


def plan_packs(
    shape: LlamaShape, config: RunConfig, lengths: Sequence[int], num_labels: int, memory_gib: float
) -> PackPlan:
    """Choose the fastest of all ways to train within the memory, by forecast.

    Args:
        lengths: tokens of each training example.
        num_labels: most answer tokens of one global batch.
        memory_gib: what a worker may use, the CUDA context not counted; GiB = 2**30 bytes.

    Raises:
        ResourceError: even the longest example alone does not fit with everything recomputed.
    """
    train = config.train
    mean = train.global_batch_size / train.num_workers * sum(lengths) / len(lengths)
    best: PackPlan | None = None
    least = 0.0
    for keep_unpacked, recompute in _ways(config):
        fixed = count_fixed_bytes(shape, config, num_labels, keep_unpacked=keep_unpacked)
        per_token = shape.num_layers * count_kept_bytes(shape, config, recompute)
        per_token += count_working_bytes(shape, config, recompute)
        fitting = int((memory_gib * GIB - fixed) / per_token)
        needed = (fixed + per_token * max(lengths)) / GIB
        least = min(least or needed, needed)
        if fitting < max(lengths):
            continue
        max_tokens = min(fitting, train.max_pack_tokens)
        max_tokens = max(max_tokens, max(lengths))
        cost = _cost(recompute, keep_unpacked or config.model.bits == 16, mean, max_tokens)
        plan = PackPlan(
            keep_unpacked=keep_unpacked,
            recompute=recompute,
            max_tokens=max_tokens,
            peak_gib=(fixed + per_token * max_tokens) / GIB,
            cost=cost,
        )
        if best is None or plan.cost < best.cost:
            best = plan
    if best is None:
        raise ResourceError(
            f"the longest example has {max(lengths):,} tokens and needs at least {least:.1f} GiB, {memory_gib:.1f} GiB are "
            "given: set train.recompute=layer, use fewer model.bits, lower model.max_seq_len with data.too_long=skip, or "
            "take a larger GPU."
        )
    return best


def _ways(config: RunConfig) -> Iterator[tuple[bool, Recompute]]:
    train = config.train
    unpack = {"always": (True,), "never": (False,), "auto": (True, False)}[train.unpack_weights]
    for keep_unpacked in unpack if config.model.bits == 4 else (False,):
        for recompute in get_args(Recompute) if train.recompute == "auto" else (train.recompute,):
            yield keep_unpacked, recompute


def _cost(recompute: Recompute, is_dense: bool, mean_tokens: float, max_tokens: int) -> float:
    """Return passes through the layers times tokens, with what each pack costs whatever its length."""
    passes = {"none": 2.0, "mlp": 2.5, "layer": 3.0}[recompute]
    num_packs = max(1.0, 1.15 * mean_tokens / max_tokens)
    overhead = _PACK_OVERHEAD + (0 if is_dense else _UNPACK_OVERHEAD)
    return passes * (mean_tokens + num_packs * overhead)
