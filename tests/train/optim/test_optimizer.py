"""The learning rate against numbers by hand, and the optimisers that the config names."""

from __future__ import annotations

import pytest
import torch

from finlora.config import OptimConfig
from finlora.train.optim.optimizer import learning_rate_at, make_optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 10 steps, 2 of warm-up, then 8 over which the rate falls from its peak towards 0.
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        (
            "cosine",
            [0.5, 1, 1, 0.9619397663, 0.8535533906, 0.6913417162, 0.5, 0.3086582838, 0.1464466094, 0.0380602337],
        ),
    ],
)
def test_learning_rate_follows_its_course(schedule, expected):
    optim = OptimConfig(schedule=schedule, warmup_ratio=0.2, learning_rate=2e-3)
    rates = [learning_rate_at(step, 10, optim) for step in range(10)]
    assert rates == pytest.approx([2e-3 * value for value in expected], rel=1e-9)


def test_warm_up_of_a_short_run_is_one_step_at_the_peak():
    optim = OptimConfig(warmup_ratio=0.03, learning_rate=1.0)
    assert [learning_rate_at(step, 4, optim) for step in range(4)] == pytest.approx([1, 1, 2 / 3, 1 / 3])


def test_without_warm_up_the_first_step_has_the_peak():
    optim = OptimConfig(warmup_ratio=0.0, learning_rate=1.0)
    assert [learning_rate_at(step, 2, optim) for step in range(2)] == [1.0, 0.5]
    assert learning_rate_at(0, 1, optim) == 1.0


def test_adamw_is_torchs_with_the_configs_numbers():
    parameter = torch.nn.Parameter(torch.ones(3))
    optim = OptimConfig(learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.5)
    optimizer = make_optimizer([parameter], optim, 10)
    assert type(optimizer) is torch.optim.AdamW
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.5,
    }


def test_zero_one_adam_is_our_own():
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(3))], OptimConfig(name="zero_one_adam"), 10)
    assert type(optimizer).__module__ == "finlora.train.optim.zero_one_adam"
