"""Forecast of a micro-batch's time: near for known sizes, never too long for others."""

from __future__ import annotations

import pytest

from finlora.engine.meter import Forecast


def fill(points):
    forecast = Forecast()
    for num_rows, seconds in points:
        forecast.add(num_rows, seconds)
    return forecast


def test_forecast_is_zero_before_the_first_micro_batch():
    assert Forecast().estimate(100) == 0.0


def test_two_sizes_have_two_times():
    forecast = fill([(440, 0.035), (150, 0.018)] * 8)
    assert forecast.estimate(440) == pytest.approx(0.035)
    assert forecast.estimate(150) == pytest.approx(0.018)


def test_few_rows_scale_down_the_time_of_large_micro_batches():
    forecast = fill([(12288, 0.3)] * 20)
    assert forecast.estimate(14) == pytest.approx(0.3 * 14 / 12288)
    assert forecast.estimate(20000) == pytest.approx(0.3)


def test_outliers_and_old_micro_batches_do_not_count():
    assert fill([*[(256, 0.02)] * 4, (256, 3.0)]).estimate(256) == pytest.approx(0.02)
    assert fill([*[(256, 3.0)] * 9, *[(256, 0.02)] * 32]).estimate(256) == pytest.approx(0.02)
