"""Registry of the adapter's optimisers, and the learning rate schedule.

To add an optimiser, add its record to OPTIMIZERS here and its name and settings to `OptimConfig`. Training, checkpoints and the
memory forecast read the record. This module imports no torch, since forecasts read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from finlora.config import OptimConfig
from finlora.errors import ConfigError
from finlora.formula.low_rank import is_up

if TYPE_CHECKING:
    import torch

    from finlora.optim.traffic import WireClock

BLOCK_SIZE = 512
"""Elements that share a scale in 0/1 Adam."""
RATE_FACTOR = "rate_factor"
"""Key of a parameter group: its learning rate is the schedule's times this; 1 where it is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerKind:
    """Everything that training has to know of an optimiser."""

    name: str
    """Value of `optim.name`."""
    build: Callable[
        [Sequence[torch.nn.Parameter], Sequence[float], OptimConfig, int, WireClock | None], torch.optim.Optimizer
    ]
    """Takes the adapter's parameters, the factor of each one's learning rate, the settings, the steps of the whole run, and the
    clock of its communication."""
    averages_gradients: bool
    """True: it averages over the workers, counts its traffic (`SelfCounting`) and has `is_synchronised`.
    False: DeepSpeed averages the gradients. Each optimiser clips them itself."""
    saves: frozenset[str]
    """Names of the tensors in its state_dict: of one parameter, or of one flat vector of all."""
    reads: frozenset[str]
    """Settings of the section `optim` that `build` reads."""
    count_state_bytes: Callable[[Sequence[int], int, int, bool], int]
    """Takes the sizes of the parameters, the workers, the bytes of an element, and whether learning rates differ; returns the
    bytes of one worker's state."""


def find_optimizer(name: str) -> OptimizerKind:
    """Return the record of an optimiser.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"optim.name={name!r}: expected one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def make_optimizer(
    parameters: Sequence[torch.nn.Parameter] | Mapping[str, torch.nn.Parameter],
    optim: OptimConfig,
    total_steps: int,
    clock: WireClock | None = None,
) -> torch.optim.Optimizer:
    """Build the optimiser of a config over the adapter's parameters.

    Args:
        parameters: by their names; without names only where all have one learning rate.
        total_steps: optimiser steps of the whole run.
        clock: times the communication of an optimiser that averages the gradients itself.

    Raises:
        ConfigError: there is no optimiser of that name.
    """
    kind = find_optimizer(optim.name)
    if isinstance(parameters, Mapping):
        factors = [rate_factor(name, each.ndim, optim.lora_plus_ratio) for name, each in parameters.items()]
        parameters = list(parameters.values())
    elif optim.lora_plus_ratio != 1:
        raise ValueError("optim.lora_plus_ratio needs the names of the parameters")
    else:
        factors = [1.0] * len(parameters)
    return kind.build(parameters, factors, optim, total_steps, clock)


def rate_factor(name: str, num_axes: int, ratio: float) -> float:
    """Return the factor of a parameter's learning rate: `ratio` for B and for vectors, 1 for A.

    Source: LoRA+, arXiv:2402.12354; PEFT's create_loraplus_optimizer.
    """
    return ratio if is_up(name) or num_axes == 1 else 1.0


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of a step: `rate` times the factor of each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATE_FACTOR, 1.0)


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


def _build_adamw(
    parameters: Sequence[torch.nn.Parameter],
    factors: Sequence[float],
    optim: OptimConfig,
    _total_steps: int,
    _clock: WireClock | None,
) -> torch.optim.Optimizer:
    from finlora.optim.adamw import ClippedAdamW

    groups = [
        {
            "params": [each for each, own in zip(parameters, factors, strict=True) if own == factor],
            "lr": optim.learning_rate * factor,
            RATE_FACTOR: factor,
        }
        for factor in sorted(set(factors))
    ]
    return ClippedAdamW(
        groups if len(groups) > 1 else parameters,
        lr=optim.learning_rate,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.max_grad_norm,
    )


def _count_adamw_bytes(sizes: Sequence[int], _num_workers: int, _parameter_bytes: int, _has_factors: bool) -> int:
    """m and v in float32."""
    return 8 * sum(sizes)


def _build_zero_one_adam(
    parameters: Sequence[torch.nn.Parameter],
    factors: Sequence[float],
    optim: OptimConfig,
    total_steps: int,
    clock: WireClock | None,
) -> torch.optim.Optimizer:
    from finlora.optim.zero_one_adam import ZeroOneAdam

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
        block_size=BLOCK_SIZE,
        clock=clock,
        rate_factors=factors,
    )


def _count_zero_one_bytes(sizes: Sequence[int], num_workers: int, parameter_bytes: int, has_factors: bool) -> int:
    """m, v, u, the last synchronised weights, the worker's error and its share of the server's in float32; a byte mask.

    All over parameters padded to whole blocks. Parameters that are not float32 add a float32 master copy, learning rates that
    differ a float32 factor.
    """
    blocks = sum(-(-size // BLOCK_SIZE) for size in sizes)
    padded = -(-blocks // num_workers) * num_workers * BLOCK_SIZE
    masters = 4 * padded if parameter_bytes != 4 else 0
    factors = 4 * padded if has_factors else 0
    return 5 * 4 * padded + 4 * padded // num_workers + padded + masters + factors


_ADAM = frozenset({"learning_rate", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm"})

OPTIMIZERS = {
    kind.name: kind
    for kind in (
        OptimizerKind(
            name="adamw",
            build=_build_adamw,
            averages_gradients=False,
            saves=frozenset({"step", "exp_avg", "exp_avg_sq"}),
            reads=_ADAM,
            count_state_bytes=_count_adamw_bytes,
        ),
        OptimizerKind(
            name="zero_one_adam",
            build=_build_zero_one_adam,
            averages_gradients=True,
            saves=frozenset({"m", "v", "u", "last_synced", "norm_ratio", "weights", "worker_error", "server_error"}),
            reads=_ADAM | {"freeze_ratio", "max_local_steps"},
            count_state_bytes=_count_zero_one_bytes,
        ),
    )
}
"""Optimisers by name."""
