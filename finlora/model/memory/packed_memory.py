"""Forecast of the memory of a packed training step (finlora/model/layers/packed_layer.py), and the plan that it decides.

Legend, all in bytes: e an activation's element (2 in bfloat16), T rows of a pack, H hidden, Q query width, K key-value width,
I intermediate, h heads, k adapted projections of rank r, L layers, N labelled rows, V vocabulary.

Saved for the backward pass, a layer and row; of the last layer only its input, q, k and v, since only N rows go on from there:
    always     e H                                      the layer's input
    not layer  e (2 Q + 2 K + H + k r) + 4 h            q, k, v; attention's output and log-sum-exp; y; D(x) A^T of each update
               e (Q + K)                                q and k before their norm, in families that have one
    none       2 e I                                    gate and up
Peak beside the saved tensors, the highest of these moments:
    head       8 V for each labelled row of a chunk     logits and their log-softmax in float32
    MLP        recomputed tensors, the gradients of z, of silu(g) u, and of gate and up: e (H + 3 I) a row; with LoRA on down
               also e I for its input, and with dropout e I for that input's gradient and I for its mask; or, while a
               product's weight is unpacked, e (H + I) a row and the weight
    LLM.int8   recomputed tensors, the int32 product of gate and up and two rows of H: 8 I + 2 e H a row
Attention's moment is lower, since gate and up are freed by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from finlora.config import RunConfig
from finlora.data.pack_size import PackSize, most_tokens
from finlora.formula.llama import LlamaShape, find_projection
from finlora.model.memory.fixed_memory import (
    GIB,
    context_gib,
    count_adapter_file_bytes,
    count_adapter_parameters,
    count_load_peak_bytes,
    count_optimizer_bytes,
    count_start_bytes,
    count_weight_bytes,
)
from finlora.model.memory.padded_memory import MemoryPlan, element_bytes
from finlora.precision import count_bytes

Recompute = Literal["none", "mlp", "layer"]

HEAD_CHUNK = 2048
_PACK_OVERHEAD, _UNPACK_OVERHEAD = 100, 300
"""Tokens whose products take as long as reading the weights once, and as unpacking them once: rules of thumb."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """A worker's examples, from which its packs are made."""

    longest: int
    """Tokens of the longest example."""
    mean_share: float
    """Mean tokens of a worker's share of a global batch."""
    largest_share: int
    """Most tokens of a worker's share of a global batch."""
    measure: Callable[[int], PackSize]
    """Most tokens a pack -> most rows and labels of any pack of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """A way to train packed, with its forecast."""

    keep_unpacked: bool
    recompute: Recompute
    max_tokens: int
    """Most tokens a pack."""
    size: PackSize
    """The largest pack of the run."""
    memory: MemoryPlan
    cost: float
    """Relative time of a step: tokens times passes through the layers."""

    def fits(self, memory_gib: float) -> bool:
        """Return whether training and loading stay within the memory that torch may allocate."""
        return max(self.memory.train_peak_gib, self.memory.load_peak_gib) <= memory_gib


def casts_at_once(target_modules: Sequence[str]) -> bool:
    """Return whether each pass casts A and B of all projections at once and holds the casts, in place of a cast at each use."""
    return any(find_projection(target).product != "qkv" for target in target_modules)


def count_kept_bytes(shape: LlamaShape, config: RunConfig, recompute: Recompute) -> int:
    """Return the bytes that one layer saves of one token for the backward pass."""
    e, lora = element_bytes(config), config.lora
    kept = e * shape.hidden_size
    if recompute == "layer":
        return kept
    low = sum(lora.settings.ranks)
    kept += e * (2 * shape.query_size + 2 * shape.kv_size + shape.hidden_size + low) + 4 * shape.num_heads
    kept += _count_head_bytes(shape, e)
    return kept + (2 * e * shape.intermediate_size if recompute == "none" else 0)


def _count_head_bytes(shape: LlamaShape, element: int) -> int:
    """Return the bytes of one token's queries and keys before their norm; 0 in families without one."""
    return element * (shape.query_size + shape.kv_size) if shape.additions.has_head_norms else 0


def _count_down_bytes(shape: LlamaShape, config: RunConfig) -> int:
    """Return the bytes of one token that down's update needs in the backward pass: its input, and with dropout that input's
    gradient and mask."""
    if "down" not in {find_projection(target).product for target in config.lora.target_modules}:
        return 0
    e = element_bytes(config)
    return shape.intermediate_size * (2 * e + 1 if config.lora.dropout else e)


def count_pack_bytes(
    shape: LlamaShape, config: RunConfig, size: PackSize, recompute: Recompute, *, keep_unpacked: bool
) -> int:
    """Return the peak activation memory of a pack, by the module's table."""
    e, hidden, inner = element_bytes(config), shape.hidden_size, shape.intermediate_size
    bits = 16 if keep_unpacked else config.model.bits
    # at 8 bit gate and up are one weight and unpacked together; NF4's scales are unpacked to float32 first
    weight = {16: 0, 4: e * hidden * inner + 4 * hidden * inner // 64, 8: 2 * e * hidden * inner}[bits]
    a_row = count_kept_bytes(shape, config, recompute)
    again = count_kept_bytes(shape, config, "none") - a_row
    last = e * (hidden + (0 if recompute == "layer" else shape.query_size + 2 * shape.kv_size))
    last += 0 if recompute == "layer" else _count_head_bytes(shape, e)
    moments = [
        last * size.num_rows + 8 * shape.vocab_size * min(size.num_labels, HEAD_CHUNK),
        (again + e * (hidden + 3 * inner) + _count_down_bytes(shape, config)) * size.num_rows,
        (again + e * (hidden + inner)) * size.num_rows + weight,
        (again + 8 * inner + 2 * e * hidden) * size.num_rows if config.model.bits == 8 else 0,
    ]
    return (shape.num_layers - 1) * a_row * size.num_rows + max(moments)


def forecast_packs(
    shape: LlamaShape, config: RunConfig, size: PackSize, recompute: Recompute, *, keep_unpacked: bool
) -> MemoryPlan:
    """Forecast a worker's memory for a size of its largest pack."""
    element = count_bytes(config)
    weights = count_weight_bytes(shape, 16 if keep_unpacked else config.model.bits, element)
    num_parameters, e = count_adapter_parameters(shape, config.lora), element_bytes(config)
    adapter = 4 * num_parameters
    casts = e * num_parameters if e < 4 and casts_at_once(config.lora.target_modules) else 0
    optim = config.optim
    optimizer = count_optimizer_bytes(
        shape, config.lora, optim.name, config.train.num_workers, has_factors=optim.lora_plus_ratio != 1
    )
    activations = casts + count_pack_bytes(shape, config, size, recompute, keep_unpacked=keep_unpacked)
    if config.train.device == "cuda":
        activations += adapter  # where CUDA graphs write the gradients, before they are the optimiser's
    load_peak = max(
        count_load_peak_bytes(shape, config.model.bits, element), weights + count_start_bytes(shape, config.lora)
    )
    if keep_unpacked:  # gate and up are held twice while they are joined
        load_peak = max(load_peak, weights + 2 * element * shape.hidden_size * shape.intermediate_size)
    return MemoryPlan(
        weights_gib=weights / GIB,
        adapter_gib=adapter / GIB,
        optimizer_gib=optimizer / GIB,
        activations_gib=activations / GIB,
        load_peak_gib=load_peak / GIB,
        context_gib=context_gib(config.train.device),
        adapter_file_mib=count_adapter_file_bytes(shape, config.lora) / 2**20,
        micro_batch=None,
    )


def plan_packs(shape: LlamaShape, config: RunConfig, work: Workload, memory_gib: float) -> PackPlan:
    """Choose by forecast the fastest way to train within the memory; if none fits, the one that needs least.

    Args:
        memory_gib: memory that torch may allocate for a worker; GiB = 2**30 bytes.
    """
    plans = []
    most = max(work.longest, min(config.train.max_pack_tokens, work.largest_share))
    largest = work.measure(most)

    def plan(max_tokens: int, size: PackSize, recompute: Recompute, keep_unpacked: bool) -> PackPlan:
        is_dense = keep_unpacked or config.model.bits == 16
        return PackPlan(
            keep_unpacked=keep_unpacked,
            recompute=recompute,
            max_tokens=max_tokens,
            size=size,
            memory=forecast_packs(shape, config, size, recompute, keep_unpacked=keep_unpacked),
            cost=_cost(recompute, is_dense, work.mean_share, max_tokens),
        )

    for keep_unpacked, recompute in _ways(config):
        found = plan(most, largest, recompute, keep_unpacked)
        if not found.fits(memory_gib):
            # Memory is linear in the rows, above that of an empty pack.
            none = PackSize(num_rows=0, num_labels=largest.num_labels)
            fixed = forecast_packs(shape, config, none, recompute, keep_unpacked=keep_unpacked).train_peak_gib
            room = (memory_gib - fixed) / (found.memory.train_peak_gib - fixed) * largest.num_rows
            fitting = max(work.longest, min(most, most_tokens(int(room))))
            found = plan(fitting, work.measure(fitting), recompute, keep_unpacked)
        plans.append(found)
    fitting_plans = [plan for plan in plans if plan.fits(memory_gib)]
    if fitting_plans:
        return min(fitting_plans, key=lambda plan: plan.cost)
    return min(plans, key=lambda plan: plan.memory.train_peak_gib)


def _ways(config: RunConfig) -> Iterator[tuple[bool, Recompute]]:
    train = config.train
    unpack = {"always": (True,), "never": (False,), "auto": (True, False)}[train.unpack_weights]
    for keep_unpacked in unpack if config.model.bits == 4 else (False,):
        for recompute in get_args(Recompute) if train.recompute == "auto" else (train.recompute,):
            yield keep_unpacked, recompute


def _cost(recompute: Recompute, is_dense: bool, mean_tokens: float, max_tokens: int) -> float:
    """Return passes through the layers times tokens, with a fixed cost of each pack."""
    passes = {"none": 2.0, "mlp": 2.5, "layer": 3.0}[recompute]
    num_packs = max(1.0, 1.15 * mean_tokens / max_tokens)
    overhead = _PACK_OVERHEAD + (0 if is_dense else _UNPACK_OVERHEAD)
    return passes * (mean_tokens + num_packs * overhead)
