"""0/1 Adam against its plain reference, over real processes: each world starts once and reports what the tests compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor
from zero_one_adam_reference import run as run_reference
from zero_one_adam_reference import variance_steps
from zero_one_adam_world import (
    BLOCK,
    BLOCKS,
    CONVERGENCE_PEAK,
    CONVERGENCE_STEPS,
    FREEZE_RATIO,
    MAX_LOCAL_STEPS,
    SEEDS,
    STEPS,
    TOLERANCE,
    WEIGHT_DECAY,
    Regression,
    flat_of,
    learning_rates,
    load,
    make_optimizer,
    parameters_of,
    report_of_rank,
    take_step,
    train,
)

from finlora.errors import CheckpointError, ConfigError
from finlora.train.onebit import Schedule, pack_signs, unpack_signs


@pytest.fixture(scope="module", params=[1, 2, 4])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One report a rank, of a world of 1, 2 or 4 processes over gloo."""
    folder = tmp_path_factory.mktemp(f"world{request.param}")
    mp.spawn(report_of_rank, args=(request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(request.param)]


def is_equal_everywhere(tensors: list[Tensor]) -> bool:
    return all(torch.equal(tensors[0], other) for other in tensors[1:])


def expected_weights(reports: list[dict[str, Any]], **changes: Any) -> list[list[Tensor]]:
    """Every worker's weights after every step, by the reference."""
    problem, schedule = Regression(seed=0), Schedule.from_ratio(STEPS, FREEZE_RATIO, MAX_LOCAL_STEPS)
    settings: dict[str, Any] = {
        "start": problem.start,
        "gradient": problem.gradient,
        "num_workers": len(reports),
        "learning_rates": learning_rates(STEPS, 0.03),
        "freeze_steps": 30,
        "sync_interval": schedule.sync_interval,
        "blocks": BLOCKS,
        "weight_decay": WEIGHT_DECAY,
    }
    return run_reference(**settings | changes)


def test_trajectory_equals_reference(reports) -> None:
    expected = expected_weights(reports)
    for rank, report in enumerate(reports):
        worker = torch.stack([weights[rank] for weights in expected])
        assert (report["weights"] - worker).abs().max() <= TOLERANCE
    assert (worker[-1] - Regression(seed=0).start).abs().max() > 0.1


def test_ranks_agree_at_synchronisations_and_differ_between(reports) -> None:
    flags = reports[0]["flags"]
    assert all(flags[:30]), "every step synchronises before the freeze"
    assert flags[-1], "the last step synchronises"
    assert not all(flags)
    for step, is_synchronised in enumerate(flags):
        assert all(report["flags"][step] == is_synchronised for report in reports)
        if len(reports) > 1:
            assert is_equal_everywhere([report["weights"][step] for report in reports]) == is_synchronised


def test_resumed_run_continues_bit_for_bit(reports) -> None:
    for report in reports:
        for weights, bytes_sent, num_syncs in report["resumed"].values():
            assert torch.equal(weights, report["weights"][-1])
            assert not torch.equal(weights, report["weights"][-2])
            assert (bytes_sent, num_syncs) == (report["bytes"][0], report["bytes"][2])


def test_forced_synchronisation_makes_ranks_equal(reports) -> None:
    assert all(not report["forced"][0] and report["forced"][1] for report in reports)
    assert is_equal_everywhere([report["forced"][2] for report in reports])
    between, schedule = (
        reports[0]["flags"].index(False, 40) + 1,
        Schedule.from_ratio(STEPS, FREEZE_RATIO, MAX_LOCAL_STEPS),
    )
    expected = expected_weights(reports, sync_interval=lambda t: 1 if t == between else schedule.sync_interval(t))
    torch.testing.assert_close(reports[0]["forced"][2], expected[between - 1][0], atol=TOLERANCE, rtol=TOLERANCE)


def test_first_step_takes_weights_of_rank_0(reports) -> None:
    assert is_equal_everywhere([report["after_unequal_start"] for report in reports])  # others began 1 and more away
    assert (reports[0]["after_unequal_start"] - Regression(seed=0).start).abs().max() < 0.011


def test_bfloat16_parameters_follow_float32_master(reports) -> None:
    problem = Regression(seed=0)

    def rounded_gradient(worker: int, step: int, weights: Tensor) -> Tensor:
        return problem.gradient(worker, step, weights.bfloat16().float()).bfloat16().float()

    expected = expected_weights(reports, start=problem.start.bfloat16().float(), gradient=rounded_gradient)[-1]
    for rank, report in enumerate(reports):
        weights, flags, master = report["bf16"]
        assert torch.equal(weights[-1], master.bfloat16().float())
        assert not torch.equal(weights[-1], master)
        # One weight that float32 noise rounds the other way would be 2^-9 of itself off: far above what noise alone does.
        assert (master - expected[rank]).abs().max() < 1e-3
        assert set(report["bf16_state_dtypes"].values()) == {torch.float32}
        assert torch.equal(report["bf16_resumed"], master)
    for step in (step for step, is_synchronised in enumerate(flags) if is_synchronised):
        assert is_equal_everywhere([report["bf16"][0][step] for report in reports])


def test_bytes_equal_formula(reports) -> None:
    n, schedule = len(reports), Schedule.from_ratio(STEPS, FREEZE_RATIO, MAX_LOCAL_STEPS)
    num_exact = len(variance_steps(schedule.freeze_steps))
    for report in reports:
        bytes_sent, bytes_adam, num_syncs = report["bytes"]
        size, num_compressed = report["padded"], sum(report["flags"]) - num_exact
        assert num_syncs == (sum(report["flags"]) if n > 1 else 0)
        assert (
            bytes_sent == 2 * (n - 1) * (num_exact * 4 * size + num_compressed * (size // 8 + 4 * size // BLOCK)) // n
        )
        assert bytes_adam == STEPS * 2 * (n - 1) * 4 * 45 // n


def test_long_run_sends_less_than_a_tenth_of_adam(reports) -> None:
    for report in reports:
        bytes_sent, bytes_adam, num_syncs = report["long_bytes"]
        assert bytes_sent <= bytes_adam / 10
        assert num_syncs < 400 / 2
        assert bytes_sent > 0 or len(reports) == 1


def test_bytes_counted_are_those_handed_to_collectives(reports) -> None:
    for report in reports:
        counted, handed_over = report["exchange_bytes"]
        assert counted == handed_over
        assert counted > 0 or len(reports) == 1


def test_compressed_average_plus_errors_is_exact_sum(reports) -> None:
    n = len(reports)
    for rounds in zip(*(report["exchange"] for report in reports), strict=True):
        values, worker_old, server_old, averages, worker_new, server_new = (
            list(column) for column in zip(*rounds, strict=True)
        )
        assert is_equal_everywhere(averages)
        assert torch.count_nonzero(averages[0][60:]) == 0
        if n == 1:
            assert torch.equal(averages[0], values[0])
            continue
        owed = sum(values) / n + sum(worker_old) / n + torch.cat(server_old)
        assert all(error.abs().max() > 0 for error in (*worker_new, *server_new))
        assert all(len(block.abs().unique()) == 1 for block in averages[0][:56].split(BLOCK)), "one scale a block"
        paid = averages[0] + sum(worker_new) / n + torch.cat(server_new)
        torch.testing.assert_close(paid, owed, atol=TOLERANCE, rtol=TOLERANCE)


def test_final_loss_is_near_adamw(reports) -> None:
    for seed in SEEDS:
        problem, n = Regression(seed), len(reports)
        weights = problem.start.clone().requires_grad_()
        adamw = torch.optim.AdamW([weights], weight_decay=0.0)
        for step, lr in enumerate(learning_rates(CONVERGENCE_STEPS, CONVERGENCE_PEAK), start=1):
            weights.grad = sum(problem.gradient(worker, step, weights.detach()) for worker in range(n)) / n
            adamw.param_groups[0]["lr"] = lr
            adamw.step()
        reached, start = problem.loss(weights.detach()), problem.loss(problem.start)
        assert reached < 0.2 * start
        assert reports[0]["final_loss"][seed] < 1.06 * reached


def test_state_of_another_world_size_is_refused(reports) -> None:
    optimizer = make_optimizer(parameters_of(Regression(0).start))
    state = load(reports[-1]["states"][44])
    if len(reports) == 1:
        optimizer.load_state_dict(state)
        return
    with pytest.raises(CheckpointError, match="resume with the same workers") as caught:
        optimizer.load_state_dict(state)
    assert f"world_size {len(reports)}, expected 1" in str(caught.value)


def test_state_of_another_optimizer_is_refused() -> None:
    parameters = parameters_of(Regression(0).start)
    with pytest.raises(CheckpointError, match="set optim"):
        make_optimizer(parameters).load_state_dict(torch.optim.AdamW(parameters).state_dict())


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


def test_signs_survive_packing() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -1.5, 1e-38, -1e-38, float("inf"), float("-inf")])
    assert unpack_signs(pack_signs(values)).tolist() == [1, 1, 1, -1, 1, -1, 1, -1]
    many = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    packed = pack_signs(many)
    assert packed.shape == (3, 8)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_signs(packed), many.sign())


def test_schedule_scales_to_run_length() -> None:
    schedule = Schedule.from_ratio(5000, 0.2, 16)
    steps = [step for step in range(1, 5001) if schedule.is_variance_step(step)]
    assert set(steps) == variance_steps(1000)
    assert steps[:18] == [*range(1, 18), 19]
    assert [schedule.sync_interval(step) for step in (1, 1000, 1001, 1801, 2601, 3401, 4201, 4999, 5000, 6000)] == [
        *(1, 1, 1, 2, 4, 8, 16, 16, 1, 1)
    ]
    assert Schedule.from_ratio(60, 0.2, 16).freeze_steps == 12
    assert Schedule.from_ratio(20, 0.1, 16).freeze_steps == 10
    assert Schedule.from_ratio(3, 0.1, 16).freeze_steps == 3
    assert Schedule.from_ratio(100, 0.1, 12).sync_interval(99) == 12


def test_wrong_settings_are_refused() -> None:
    parameters = parameters_of(Regression(0).start)
    with pytest.raises(ConfigError, match=r"total_steps=0(.|\n)*freeze_ratio=2(.|\n)*max_local_steps=0"):
        make_optimizer(parameters, total_steps=0, freeze_ratio=2, max_local_steps=0)
    with pytest.raises(ConfigError, match="multiple of 8"):
        make_optimizer(parameters, block_size=12)
    with pytest.raises(ConfigError, match="second parameter group"):
        make_optimizer([{"params": [parameter]} for parameter in parameters])
