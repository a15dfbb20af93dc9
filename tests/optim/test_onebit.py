"""Schedule of 0/1 Adam's exchanges, and signs packed eight to a byte."""

from __future__ import annotations

import torch
from zero_one_adam_reference import variance_steps

from finlora.optim.onebit import Schedule, pack_signs, unpack_signs


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
    assert Schedule.from_ratio(300, 0.1, 12).sync_interval(299) == 12
    # 90 steps in five spans of 18: gaps of 8 would come twice, so 4 is the longest.
    assert [Schedule.from_ratio(100, 0.1, 16).sync_interval(step) for step in (11, 30, 47, 70, 99)] == [1, 2, 4, 4, 4]
