"""Learning rate compared with numbers computed by hand, and the registry of optimisers with their behaviour."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from finlora.config import OptimConfig
from finlora.errors import ConfigError
from finlora.optim.optimizer import OPTIMIZERS, find_optimizer, learning_rate_at, make_optimizer, set_rate
from finlora.optim.traffic import SelfCounting

EVERY_KIND = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
OF_ALL = {"name", "schedule", "warmup_ratio", "lora_plus_ratio"}  # read by training itself, whatever the optimiser


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
    assert isinstance(optimizer, torch.optim.AdamW)
    (group,) = optimizer.param_groups
    assert {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")} == {
        "lr": 0.1,
        "betas": (0.8, 0.9),
        "eps": 1e-6,
        "weight_decay": 0.5,
    }


def test_zero_one_adam_is_our_own():
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(3))], OptimConfig(name="zero_one_adam"), 10)
    assert type(optimizer).__module__ == "finlora.optim.zero_one_adam"


def test_config_allows_the_optimisers_of_the_registry():
    assert get_args(get_type_hints(OptimConfig)["name"]) == tuple(OPTIMIZERS)
    assert {field.name for field in dataclasses.fields(OptimConfig)} == OF_ALL.union(
        *(kind.reads for kind in OPTIMIZERS.values())
    )


def test_unknown_optimiser_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"optim\.name='lion': expected one of adamw, zero_one_adam"):
        make_optimizer([torch.nn.Parameter(torch.ones(3))], SimpleNamespace(name="lion"), 10)
    with pytest.raises(ConfigError, match="'sgd'"):
        find_optimizer("sgd")


@EVERY_KIND
def test_optimiser_reads_the_settings_of_its_record(kind):
    read = set()

    class Watched:
        def __getattr__(self, name):
            read.add(name)
            return getattr(OptimConfig(), name)

    kind.build([torch.nn.Parameter(torch.ones(3))], [1.0], Watched(), 10, None)
    assert read == kind.reads


@EVERY_KIND
def test_optimiser_that_averages_gradients_also_counts_its_traffic_and_knows_when_weights_agree(kind):
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(3))], OptimConfig(name=kind.name), 10)
    assert isinstance(optimizer, SelfCounting) == hasattr(optimizer, "is_synchronised") == kind.averages_gradients


@EVERY_KIND
def test_state_holds_the_tensors_of_the_record(kind):
    parameters = [torch.nn.Parameter(torch.ones(512)), torch.nn.Parameter(torch.ones(32, 48))]
    optimizer = make_optimizer(parameters, OptimConfig(name=kind.name), 10)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert set(names_of_tensors(optimizer.state_dict())) == kind.saves


def names_of_tensors(tree):
    for name, value in tree.items():
        if isinstance(value, torch.Tensor):
            yield name
        elif isinstance(value, dict):
            yield from names_of_tensors(value)


def test_adamw_clips_as_torch_does_and_then_updates():
    torch.manual_seed(0)
    start = [torch.randn(5), torch.randn(3, 4)]
    ours, plain = ([torch.nn.Parameter(each.clone()) for each in start] for _ in range(2))
    settings = OptimConfig(max_grad_norm=0.25, weight_decay=0.1, learning_rate=0.1)
    optimizer = make_optimizer(ours, settings, 10)
    reference = torch.optim.AdamW(
        plain, lr=0.1, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=0.1
    )
    for scale in (3.0, 0.01, 1.0):
        gradients = [scale * torch.randn_like(each) for each in start]
        norm = torch.cat([each.flatten() for each in gradients]).norm()
        for own, other, gradient in zip(ours, plain, gradients, strict=True):
            own.grad, other.grad = gradient.clone(), gradient * min(1.0, 0.25 / (float(norm) + 1e-6))
        optimizer.step()
        reference.step()
    for own, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(own, other)
    with pytest.raises(ValueError, match="takes no closure"):
        optimizer.step(lambda: 0.0)


def test_lora_plus_gives_b_and_vectors_its_ratio_of_the_rate():
    shapes = {"q.lora_A.default.weight": (2, 3), "q.lora_B.default.weight": (3, 2), "q.magnitude": (3,)}
    parameters = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = make_optimizer(parameters, OptimConfig(lora_plus_ratio=16.0, learning_rate=0.25), 10)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 4.0]
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 8.0]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
    again = make_optimizer(parameters, OptimConfig(lora_plus_ratio=16.0, learning_rate=0.25), 10)
    again.load_state_dict(optimizer.state_dict())
    set_rate(again, 1.0)
    assert [group["lr"] for group in again.param_groups] == [1.0, 16.0]


@EVERY_KIND
def test_lora_plus_without_names_is_refused(kind):
    with pytest.raises(ValueError, match="needs the names"):
        make_optimizer([torch.nn.Parameter(torch.ones(3))], OptimConfig(name=kind.name, lora_plus_ratio=2.0), 10)
