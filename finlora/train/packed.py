"""Choose how a worker trains: packed where the model allows it, within the memory given; padded otherwise, and say so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from finlora.config import RunConfig
from finlora.data.encode import Encoded
from finlora.model.packed import PackedLlama, refusal
from finlora.model.packed_memory import PackPlan, plan_packs
from finlora.model.shapes import CUDA_CONTEXT_GIB, LlamaShape, shape_of
from finlora.train.batches import Batches, PackedBatches

if TYPE_CHECKING:
    from peft import PeftModel

MARGIN = 0.05
"""Share of the memory kept free for fragments of torch's caching allocator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedPath:
    """A loss module, the batches it takes, and one line for the user."""

    module: nn.Module
    batches: Batches
    words: str


def choose_packed(model: PeftModel, config: RunConfig, examples: Sequence[Encoded], device: torch.device) -> PackedPath:
    """Set a model up for packed training.

    Raises:
        ResourceError: no way to train fits the memory.
    """
    if reason := refusal(model):
        raise ValueError(reason)
    plan = plan_for(shape_of(model.get_base_model().config.to_dict()), config, examples, memory_of(config, device))
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    capture = device.type == "cuda"
    module = PackedLlama(model, dtype, recompute=plan.recompute, keep_unpacked=plan.keep_unpacked, capture=capture)
    batches = PackedBatches(
        max_tokens=plan.max_tokens,
        lengths=[item.num_tokens for item in examples],
        share_prefix=config.train.share_prefix,
        is_padded=capture,
    )
    return PackedPath(module=module, batches=batches, words=describe(plan, config))


def plan_for(shape: LlamaShape, config: RunConfig, examples: Sequence[Encoded], memory_gib: float) -> PackPlan:
    """Plan packed training of a model of that shape on encoded examples."""
    answers = sorted((len(item.answer_ids) for item in examples), reverse=True)
    share = -(-config.train.global_batch_size // config.train.num_workers)
    lengths = [item.num_tokens for item in examples]
    return plan_packs(shape, config, lengths, sum(answers[:share]), memory_gib)


def memory_of(config: RunConfig, device: torch.device) -> float:
    """Return the GiB that torch may allocate for this worker: train.memory_gib, or its share of the GPU or of the RAM."""
    if config.train.memory_gib is not None:
        return config.train.memory_gib * (1 - MARGIN)
    if device.type != "cuda":
        ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        return ram / config.train.num_workers * (1 - MARGIN)
    share = min(1.0, config.train.gpus_per_worker)
    total = float(torch.cuda.get_device_properties(device).total_memory) / 2**30
    return (total * share - CUDA_CONTEXT_GIB) * (1 - MARGIN)


def describe(plan: PackPlan, config: RunConfig) -> str:
    """Say in one line how a run trains."""
    weights = "unpacked once and kept" if plan.keep_unpacked else "unpacked for each product"
    kept = {"none": "nothing", "mlp": "gate and up projections", "layer": "whole layers"}[plan.recompute]
    base = f"4-bit weights {weights}, " if config.model.bits == 4 else ""
    return (
        f"packed, {base}{kept} recomputed, at most {plan.max_tokens:,} tokens a pack, forecast {plan.peak_gib:.1f} GiB"
    )
