"""0/1 Adam over 10,000 steps against its plain reference, on one rank, with gradients that do not follow the weights.

So rounding cannot feed upon itself: the two add float32 numbers in another order, and each step may part them by a rounding of
the weights, 2^-24 of the largest. Roundings of either sign add up as a random walk does: by the root of the number of steps.
"""

from __future__ import annotations

import torch
from zero_one_adam_reference import run as run_reference
from zero_one_adam_world import (
    BLOCKS,
    MAX_LOCAL_STEPS,
    WEIGHT_DECAY,
    flat_of,
    learning_rates,
    make_optimizer,
    parameters_of,
)

from finlora.optim.onebit import Schedule

STEPS, PEAK = 10_000, 0.01


def gradient(_worker: int, step: int, _weights: torch.Tensor) -> torch.Tensor:
    """Drift, noise, and sometimes an outlier or zeros."""
    generator = torch.Generator().manual_seed(step)
    g = torch.randn(45, generator=generator) * torch.logspace(-3, 2, 45) + 0.3
    if step % 97 == 0:
        g[step % 45] *= 1e4
    return g * 0 if step % 53 == 0 else g


def test_ten_thousand_steps_equal_the_reference() -> None:
    rates = learning_rates(STEPS, PEAK)
    start = torch.linspace(-1, 1, 45)
    parameters = parameters_of(start)
    optimizer = make_optimizer(parameters, total_steps=STEPS, freeze_ratio=0.2)
    schedule = Schedule.from_ratio(STEPS, 0.2, MAX_LOCAL_STEPS)
    expected = run_reference(
        start,
        gradient,
        num_workers=1,
        learning_rates=rates,
        freeze_steps=schedule.freeze_steps,
        sync_interval=schedule.sync_interval,
        blocks=BLOCKS,
        weight_decay=WEIGHT_DECAY,
    )
    largest = 0.0
    for step, rate in enumerate(rates, start=1):
        flat = gradient(0, step, start)
        for parameter, part in zip(parameters, parameters_of(flat), strict=True):
            parameter.grad = part.detach()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if step % 100 == 0:
            found = flat_of(parameters)
            assert found.isfinite().all()
            largest = max(largest, float((found - expected[step - 1][0]).abs().max()))
    assert largest <= STEPS**0.5 * 2.0**-24 * max(float(weights.abs().max()) for (weights,) in expected)
    assert (flat_of(parameters) - start).abs().max() > 0.5
    assert schedule.freeze_steps == 2000
    assert optimizer.is_synchronised
