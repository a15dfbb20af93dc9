"""The line through micro-batches that were: exact where they lie on one, and forgetful."""

from __future__ import annotations

import pytest

from finlora.engine.forecast import Forecast


def fill(points):
    forecast = Forecast()
    for num_rows, seconds in points:
        forecast.add(num_rows, seconds)
    return forecast


def test_nothing_is_told_before_the_first():
    assert Forecast().tell(100) == 0.0


def test_line_is_found():
    forecast = fill([(rows, 0.01 + 5e-5 * rows) for rows in (40, 900, 300, 40, 700)])
    assert forecast.tell(500) == pytest.approx(0.035)
    assert forecast.tell(0) == pytest.approx(0.01)


def test_equal_sizes_tell_their_mean_and_no_slope():
    forecast = fill([(256, seconds) for seconds in (0.02, 0.02, 0.02)])
    assert forecast.tell(256) == forecast.tell(2048) == pytest.approx(0.02)


def test_more_rows_never_take_less_and_nothing_takes_less_than_no_time():
    assert fill([(100, 0.04), (1000, 0.01)]).tell(5000) >= 0.01
    assert fill([(1000, 1.0), (2000, 3.0)]).tell(10) == 0.0


def test_what_is_long_ago_fades():
    forecast = fill([(256, 9.0), *[(256, 0.02)] * 100])
    assert forecast.tell(256) == pytest.approx(0.02, rel=0.02)
