"""Training path of a worker: packed where the model allows it and memory suffices, on padded rows otherwise.

`finlora plan` and each worker plan the path from the config and the base's config.json, before any weight is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from finlora.config import RunConfig
from finlora.data.encode import Encoded
from finlora.data.pack_size import PackSize, measure_pack
from finlora.data.packing import Form, split_by_tokens
from finlora.formula.llama import LlamaShape
from finlora.model.memory.packed_memory import PackPlan, Workload, plan_packs
from finlora.precision import is_autocast
from finlora.train.steps.batches import Batches, PackedBatches, PaddedBatches
from finlora.train.steps.sampler import Sampler

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainPath:
    """Loss module and the batches that it takes."""

    module: nn.Module
    batches: Batches


def refuse_packing(config: RunConfig) -> str | None:
    """Return the reason why a run trains on padded rows; None where it trains packed."""
    if not config.train.packing:
        return "train.packing=false"
    return "lora.dora=true, which scales the base's products too" if config.lora.dora else None


def make_sampler(config: RunConfig, examples: Sequence[Encoded]) -> Sampler:
    """Return the sampler of a run."""
    return Sampler(
        lengths=[item.num_tokens for item in examples],
        global_batch_size=config.train.global_batch_size,
        world_size=config.train.num_workers,
        seed=config.seed,
    )


def plan_path(config: RunConfig, shape: LlamaShape, examples: Sequence[Encoded], memory_gib: float) -> PackPlan:
    """Plan packed training on encoded examples from every batch of the run.

    Args:
        shape: of the base.
        memory_gib: limit of torch's allocations in a worker; GiB = 2**30 bytes.
    """
    lengths = [item.num_tokens for item in examples]
    shares = list(_shares(config, examples))
    totals = [sum(lengths[index] for index in share) for share in shares]
    train = config.train

    @cache
    def measure(max_tokens: int) -> PackSize:
        packs = [pack for share in shares for pack in split_by_tokens(share, lengths, max_tokens)]
        packs.sort(key=lambda pack: sum(lengths[index] for index in pack), reverse=True)
        largest, num_labels = PackSize(num_rows=0, num_labels=0), 0
        for pack in packs:
            items = [examples[index] for index in pack]
            num_labels = max(num_labels, sum(len(item.answer_ids) for item in items))
            # A shared prefix only makes a pack smaller, and later packs have fewer tokens: none of them can be larger.
            if sum(item.num_tokens for item in items) * 17 // 16 + 32 < largest.num_rows:
                continue
            size = measure_pack(items, share_prefix=train.share_prefix, is_padded=train.device == "cuda")
            largest = max(largest, size, key=lambda size: size.num_rows)
        return PackSize(num_rows=largest.num_rows, num_labels=max(num_labels, largest.num_labels))

    work = Workload(
        longest=max(lengths),
        mean_share=sum(totals) / len(totals),
        largest_share=max(totals),
        measure=measure,
    )
    return plan_packs(shape, config, work, memory_gib)


def take_path(
    model: PeftModel,
    config: RunConfig,
    examples: Sequence[Encoded],
    plan: PackPlan | None,
    device: torch.device,
    pad_token_id: int,
) -> TrainPath:
    """Prepare a model for training.

    Args:
        plan: of packed training. None: padded rows.
        pad_token_id: fills padded rows.
    """
    import torch

    from finlora.model.layers.packed_model import PackedLlama
    from finlora.train.steps.loop import AnswerLoss

    if plan is None:
        if config.train.gradient_checkpointing:
            settings: dict[str, Any] = {"use_reentrant": False}
            model.gradient_checkpointing_enable(settings)
        batches = PaddedBatches(micro_batch_size=config.train.micro_batch_size, pad_token_id=pad_token_id)
        return TrainPath(module=AnswerLoss(model), batches=batches)
    capture = device.type == "cuda"
    upcoming: Counter[Form] = Counter()
    module = PackedLlama(
        model,
        torch.bfloat16 if is_autocast(config) else torch.float32,
        recompute=plan.recompute,
        keep_unpacked=plan.keep_unpacked,
        capture=capture,
        upcoming=upcoming,
    )
    packs = PackedBatches(
        max_tokens=plan.max_tokens,
        lengths=[item.num_tokens for item in examples],
        share_prefix=config.train.share_prefix,
        is_padded=capture,
        upcoming=upcoming,
    )
    return TrainPath(module=module, batches=packs)


def _shares(config: RunConfig, examples: Sequence[Encoded]) -> Iterator[list[int]]:
    """Yield each worker's share of each step of the run, as example indices."""
    sampler = make_sampler(config, examples)
    steps = sampler.steps_per_epoch * config.train.epochs
    steps = min(steps, config.train.max_steps or steps)
    for batch in sampler.batches(steps):
        yield from filter(None, sampler.shares(batch))
