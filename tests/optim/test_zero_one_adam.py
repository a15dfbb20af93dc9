"""0/1 Adam against its plain reference over real processes: each world starts once and writes a report for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cluster_model import ETHERNET_10, Cluster, Load, sample_steps, simulate
from forked_ranks import run_ranks
from torch import Tensor
from zero_one_adam_reference import run as run_reference
from zero_one_adam_reference import variance_steps
from zero_one_adam_world import (
    BLOCK,
    BLOCKS,
    CONVERGENCE_PEAK,
    CONVERGENCE_SEEDS,
    CONVERGENCE_STEPS,
    FREEZE_RATIO,
    MAX_GRAD_NORM,
    MAX_LOCAL_STEPS,
    STEPS,
    TOLERANCE,
    WEIGHT_DECAY,
    Regression,
    learning_rates,
    load,
    make_optimizer,
    parameters_of,
    report_of_rank,
)

from finlora.errors import CheckpointError
from finlora.optim.onebit import Schedule


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the reports of worlds of 1, 2 and 4 processes over gloo."""
    folder = tmp_path_factory.mktemp("worlds")
    run_ranks(report_of_rank, (1, 2, 4), folder)
    return folder


@pytest.fixture(scope="module", params=[1, 2, 4])
def reports(request: pytest.FixtureRequest, worlds: Path) -> list[dict[str, Any]]:
    """One report a rank, of one of the worlds."""
    folder = worlds / str(request.param)
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


def test_own_gradients_are_clipped_less_than_their_mean(reports) -> None:
    """A rank's own gradient has more noise: clipped to the same norm, steps would be too short where v is of clipped means."""
    expected = expected_weights(reports, max_grad_norm=MAX_GRAD_NORM)
    for rank, report in enumerate(reports):
        worker = torch.stack([weights[rank] for weights in expected])
        assert (report["clipped"] - worker).abs().max() <= TOLERANCE
        assert (report["clipped"] - report["weights"]).abs().max() > 0.01  # it was clipped
        is_alone = len(reports) == 1
        assert report["norm_ratio"] == 1.0 if is_alone else 1.0 < report["norm_ratio"] < len(reports)


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


@pytest.mark.parametrize(
    ("key", "sizes", "block_size", "schedule"),
    [
        ("bytes", (30, 15), BLOCK, Schedule.from_ratio(STEPS, FREEZE_RATIO, MAX_LOCAL_STEPS)),
        ("long_bytes", (64 * 64,), 512, Schedule.from_ratio(400, 0.05, 16)),
    ],
)
def test_simulated_cluster_sends_what_these_ranks_sent(reports, key, sizes, block_size, schedule) -> None:
    """docs/explanation/scaling.md: its bytes and rounds are those of real processes."""
    load = Load(name="x", sizes=sizes, step_seconds=1.0, batch_size=2, spread=0.5, jitter=0.0, block_size=block_size)
    steps = sample_steps(load, len(reports), schedule.total_steps)
    outcome = simulate(Cluster(between=ETHERNET_10), load, "0/1 adam", schedule, steps)
    for report in reports:
        bytes_sent, _, num_syncs = report[key]
        assert (outcome.bytes_sent, outcome.rounds) == (bytes_sent, num_syncs)


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
    assert reports[0]["final_loss"].keys() == set(CONVERGENCE_SEEDS[len(reports)])
    for seed in reports[0]["final_loss"]:
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
