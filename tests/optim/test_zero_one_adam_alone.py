"""0/1 Adam on one rank, where nothing is sent: Adam's steps first, then bounded ones, with clipping."""

from __future__ import annotations

import copy

import pytest
import torch
from zero_one_adam_world import (
    STEPS,
    WEIGHT_DECAY,
    Regression,
    flat_of,
    learning_rates,
    make_optimizer,
    parameters_of,
    take_step,
    train,
)

from finlora.errors import ConfigError


def test_state_before_first_step_loads() -> None:
    problem, rates = Regression(0), learning_rates(STEPS, 0.03)
    parameters = parameters_of(problem.start)
    optimizer = make_optimizer(parameters)
    optimizer.load_state_dict(make_optimizer(parameters_of(problem.start)).state_dict())
    assert optimizer.is_synchronised
    optimizer.synchronise()
    take_step(problem, optimizer, parameters, 0, 1, rates[0])
    torch.testing.assert_close(flat_of(parameters), train(problem, 0, rates)[0][0])


def test_first_steps_equal_adamw() -> None:
    problem = Regression(0)
    ours, theirs = parameters_of(problem.start), parameters_of(problem.start)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=WEIGHT_DECAY)
    optimizer = make_optimizer(ours)
    for step in range(1, 18):
        take_step(problem, optimizer, ours, 0, step, 0.01)
        for parameter, part in zip(theirs, parameters_of(problem.gradient(0, step, flat_of(theirs))), strict=True):
            parameter.grad = part.detach()
        adamw.step()
    torch.testing.assert_close(flat_of(ours), flat_of(theirs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("num_dead", [4, 16])
def test_coordinates_without_early_gradient_do_not_explode(num_dead) -> None:
    parameter = torch.nn.Parameter(torch.zeros(16))
    alive = torch.nn.Parameter(torch.zeros(16))
    optimizer = make_optimizer([parameter, alive], weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        optimizer.param_groups[0]["lr"] = 1e-3
        parameter.grad, alive.grad = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
        if step <= 30:
            parameter.grad[:num_dead] = 0.0
        optimizer.step()
    assert parameter.abs().max() < 1e-3 * STEPS


def test_step_off_the_variance_is_bounded_as_adams() -> None:
    """After the freeze gradients grow a thousandfold; Adam's v would grow with them, here the bound of a step stands in."""
    parameter = torch.nn.Parameter(torch.zeros(32))
    optimizer = make_optimizer([parameter], weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    bound, rate = (1 - 0.9) / (1 - 0.999) ** 0.5, 1e-3
    for step in range(1, STEPS + 1):
        before = parameter.detach().clone()
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.randn(32, generator=generator) * (1000.0 if step > 30 else 1.0)
        optimizer.step()
        assert (parameter - before).abs().max() <= bound * rate / (1 - 0.9**step) * 1.0001
    assert (parameter - before).abs().max() > rate  # it was needed


def test_clipping_scales_by_the_norm_of_all_parameters() -> None:
    problem = Regression(0)
    clipped, scaled = parameters_of(problem.start), parameters_of(problem.start)
    limited, free = make_optimizer(clipped, max_grad_norm=0.25), make_optimizer(scaled)
    for step in range(1, STEPS + 1):
        gradient = problem.gradient(0, step, flat_of(clipped))
        factor = min(1.0, 0.25 / (float(gradient.norm()) + 1e-6))
        for group, part in ((clipped, gradient), (scaled, gradient * factor)):
            for parameter, own in zip(group, parameters_of(part), strict=True):
                parameter.grad = own.detach()
        for optimizer in (limited, free):
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
    torch.testing.assert_close(flat_of(clipped), flat_of(scaled))


def test_step_with_learning_rate_zero_changes_nothing() -> None:
    problem = Regression(0)
    rates = [0.0, *learning_rates(STEPS, 0.03)[1:-4], 0.0, 0.0, 0.0, 0.0]
    weights, flags, _, _ = train(problem, 0, rates)
    assert torch.equal(weights[0], problem.start)
    assert flags[-1]
    assert torch.isfinite(weights[-1]).all()


def test_closure_and_missing_gradient_are_taken() -> None:
    parameters = parameters_of(Regression(0).start)
    optimizer = make_optimizer(parameters, lr=0.1, weight_decay=0.0)

    def closure() -> float:
        loss = parameters[0].square().sum()
        loss.backward()
        return loss.item()

    before = flat_of(parameters)
    assert optimizer.step(closure) == pytest.approx(float(before[:30].square().sum()))
    assert not torch.equal(flat_of(parameters)[:30], before[:30])
    assert torch.equal(flat_of(parameters)[30:], before[30:])


def test_wrong_settings_are_refused() -> None:
    parameters = parameters_of(Regression(0).start)
    with pytest.raises(ConfigError, match=r"total_steps=0(.|\n)*freeze_ratio=2(.|\n)*max_local_steps=0"):
        make_optimizer(parameters, total_steps=0, freeze_ratio=2, max_local_steps=0)
    with pytest.raises(ConfigError, match="multiple of 8"):
        make_optimizer(parameters, block_size=12)
    with pytest.raises(ConfigError, match="second parameter group"):
        make_optimizer([{"params": [parameter]} for parameter in parameters])


FACTORS = [1.0, 8.0]


def test_factors_of_the_rate_equal_groups_of_adamw() -> None:
    problem = Regression(0)
    ours, theirs = parameters_of(problem.start), parameters_of(problem.start)
    groups = [{"params": [each], "lr": 0.01 * factor} for each, factor in zip(theirs, FACTORS, strict=True)]
    adamw = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    optimizer = make_optimizer(ours, rate_factors=FACTORS)
    for step in range(1, 18):  # of T_v
        take_step(problem, optimizer, ours, 0, step, 0.01)
        for parameter, part in zip(theirs, parameters_of(problem.gradient(0, step, flat_of(theirs))), strict=True):
            parameter.grad = part.detach()
        adamw.step()
    torch.testing.assert_close(flat_of(ours), flat_of(theirs), atol=1e-6, rtol=1e-5)


def test_factors_of_the_rate_are_a_change_of_units() -> None:
    """x with the factor f moves as f z, where z is trained without one: local steps and rounds are the same."""
    torch.manual_seed(0)
    target = torch.randn(32)
    x, z = torch.nn.Parameter(torch.zeros(32)), torch.nn.Parameter(torch.zeros(32))
    other = [torch.nn.Parameter(torch.ones(32)) for _ in range(2)]
    changes = {"weight_decay": 0.0, "eps": 0.0}
    scaled = make_optimizer([x, other[0]], rate_factors=[8.0, 1.0], **changes)
    plain = make_optimizer([z, other[1]], **changes)
    for _ in range(STEPS):
        noise = torch.randn(32)
        x.grad, z.grad = x.detach() - target + noise, 8.0 * (8.0 * z.detach() - target + noise)
        for optimizer, parameter in ((scaled, other[0]), (plain, other[1])):
            parameter.grad = parameter.detach() + noise
            optimizer.param_groups[0]["lr"] = 0.01
            optimizer.step()
        assert scaled.is_synchronised == plain.is_synchronised
        torch.testing.assert_close(x.detach(), 8.0 * z.detach(), atol=1e-4, rtol=1e-4)
    assert x.detach().abs().max() > 0.5


def test_resume_with_factors_is_exact_between_synchronisations() -> None:
    problem, rates = Regression(0), learning_rates(STEPS, 0.03)
    parameters = parameters_of(problem.start)
    optimizer = make_optimizer(parameters, rate_factors=FACTORS)
    saved = None
    for step, lr in enumerate(rates, start=1):
        take_step(problem, optimizer, parameters, 0, step, lr)
        if saved is None and step > STEPS // 2 and not optimizer.is_synchronised:
            saved = (step, copy.deepcopy(optimizer.state_dict()))
    assert saved is not None
    again = parameters_of(torch.zeros_like(problem.start))
    resumed = make_optimizer(again, rate_factors=FACTORS)
    resumed.load_state_dict(saved[1])
    for step in range(saved[0] + 1, STEPS + 1):
        take_step(problem, resumed, again, 0, step, rates[step - 1])
    assert torch.equal(flat_of(again), flat_of(parameters))
