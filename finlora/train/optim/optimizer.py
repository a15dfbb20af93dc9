"""The one seam where an optimiser is chosen, and the course of its learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from finlora.config import OptimConfig
from finlora.train.optim.traffic import WireClock


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter], optim: OptimConfig, total_steps: int, clock: WireClock | None = None
) -> torch.optim.Optimizer:
    """Build the optimiser named by the config over the adapter's parameters.

    Args:
        total_steps: optimiser steps of the whole run; 0/1 Adam scales its freezing schedule to it.
        clock: runs while 0/1 Adam communicates; AdamW does not communicate by itself.
    """
    if optim.name == "adamw":
        return torch.optim.AdamW(
            parameters,
            lr=optim.learning_rate,
            betas=(optim.beta1, optim.beta2),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
    from finlora.train.optim.zero_one_adam import ZeroOneAdam

    return ZeroOneAdam(
        parameters,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        total_steps=total_steps,
        freeze_ratio=optim.freeze_ratio,
        max_local_steps=optim.max_local_steps,
        max_grad_norm=optim.max_grad_norm,
        clock=clock,
    )


def clips_itself(optim: OptimConfig) -> bool:
    """Return whether the optimiser clips gradients; the engine, which would share the norms of all ranks, must not then."""
    return optim.name == "zero_one_adam"


def is_synchronised(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether all workers hold the same weights now: always, except between two exchanges of 0/1 Adam."""
    return bool(getattr(optimizer, "is_synchronised", True))


def learning_rate_at(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of optimiser step `step` (from 0): linear warm-up, then constant, linear or cosine to 0."""
    num_warmup = math.ceil(optim.warmup_ratio * total_steps)
    if step < num_warmup:
        return optim.learning_rate * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, total_steps - num_warmup)
    if optim.schedule == "linear":
        return optim.learning_rate * (1 - progress)
    if optim.schedule == "cosine":
        return optim.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return optim.learning_rate
