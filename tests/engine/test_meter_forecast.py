"""How long micro-batches take, told from those that were: near where they were alike, never too long where they were not."""

from __future__ import annotations

import pytest

from finlora.engine.meter import Forecast


def fill(points):
    forecast = Forecast()
    for num_rows, seconds in points:
        forecast.add(num_rows, seconds)
    return forecast


def test_nothing_is_told_before_the_first():
    assert Forecast().estimate(100) == 0.0


def test_of_two_sizes_each_has_its_own_time():
    forecast = fill([(440, 0.035), (150, 0.018)] * 8)
    assert forecast.estimate(440) == pytest.approx(0.035)
    assert forecast.estimate(150) == pytest.approx(0.018)


def test_few_rows_after_large_micro_batches_alone_are_not_said_to_take_as_long():
    forecast = fill([(12288, 0.3)] * 20)
    assert forecast.estimate(14) == pytest.approx(0.3 * 14 / 12288)
    assert forecast.estimate(20000) == pytest.approx(0.3)


def test_one_that_compiled_counts_for_nothing_and_what_is_long_ago_is_forgotten():
    assert fill([*[(256, 0.02)] * 4, (256, 3.0)]).estimate(256) == pytest.approx(0.02)
    assert fill([*[(256, 3.0)] * 9, *[(256, 0.02)] * 32]).estimate(256) == pytest.approx(0.02)
