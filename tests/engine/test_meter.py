"""Bubble meter against pipelines with a known bubble, on a simulated clock."""

from __future__ import annotations

import pytest

from finlora.engine.meter import BubbleMeter


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def play(meter, clock, num_stages, num_passes, tick=1.0, rows=10):
    """Stages of equal speed: pass m leaves stage k at tick m + k + 1."""
    begun = clock.now
    for _ in range(num_passes):
        meter.start(rows)
    for number in range(num_passes):
        clock.now = begun + (number + num_stages) * tick
        meter.end([tick] * num_stages)


@pytest.mark.parametrize(("num_stages", "num_passes"), [(1, 5), (2, 2), (4, 1), (4, 4), (4, 60)])
def test_equal_stages_reach_the_formula(num_stages, num_passes):
    clock = Clock()
    meter = BubbleMeter(clock)
    play(meter, clock, num_stages, num_passes)
    clock.now += 500  # idle
    reading = meter.read()
    assert reading.bubble == pytest.approx((num_stages - 1) / (num_passes + num_stages - 1))
    assert reading.formula == pytest.approx(reading.bubble)
    assert reading.seconds == pytest.approx(num_passes + num_stages - 1)
    assert reading.rows_per_second == pytest.approx(10 * num_passes / reading.seconds)
    assert len(set(reading.busy)) == 1


def test_a_slow_stage_enlarges_the_bubble():
    clock = Clock()
    meter = BubbleMeter(clock)
    meter.start(1)
    clock.now += 4
    meter.end([1.0, 3.0])
    reading = meter.read()
    assert reading.busy == (0.25, 0.75)
    assert reading.bubble == pytest.approx(0.5)
    assert reading.formula == pytest.approx(0.5)
    before = meter.totals()
    for _ in range(10):
        meter.start(1)
    clock.now += 31
    for _ in range(10):
        meter.end([1.0, 3.0])
    reading = meter.read(before)
    assert reading.bubble == pytest.approx(1 - 40 / 62)
    assert reading.formula == pytest.approx(1 / 11)


def test_runs_between_idle_periods_are_counted_separately():
    clock = Clock()
    meter = BubbleMeter(clock)
    for _ in range(3):
        play(meter, clock, 4, 2)
        clock.now += 50
    reading = meter.read()
    assert (reading.num_runs, reading.num_passes) == (3, 6)
    assert reading.formula == pytest.approx(3 / 5)
    assert reading.bubble == pytest.approx(3 / 5)


def test_a_reading_starts_at_given_totals_and_counts_work_in_flight():
    clock = Clock()
    meter = BubbleMeter(clock)
    assert meter.read().bubble == 0.0
    meter.start(4)
    meter.start(4)
    clock.now += 2
    first, before = meter.read(), meter.totals()
    assert (first.in_flight, first.num_passes, first.num_runs) == (2, 0, 1)
    clock.now += 1
    meter.end([1.0])
    clock.now += 1
    meter.end([1.0])
    second = meter.read(before)
    assert (second.in_flight, second.num_passes, second.num_runs, second.busy) == (1.5, 2, 1, (1.0,))


def test_an_idle_period_reads_as_idle_after_earlier_work():
    clock = Clock()
    meter = BubbleMeter(clock)
    play(meter, clock, 2, 8)
    before = meter.totals()
    clock.now += 0.5
    reading = meter.read(before)
    assert (reading.elapsed, reading.seconds, reading.num_passes) == (0.5, 0.0, 0)
    assert (reading.load, reading.busy, reading.bubble) == ((0.0, 0.0), (0.0, 0.0), 0.0)


def test_load_includes_idle_time_and_busy_does_not():
    clock = Clock()
    meter = BubbleMeter(clock)
    clock.now += 7
    before = meter.totals()
    clock.now += 3  # nothing to do
    meter.start(4)
    clock.now += 1
    meter.end([0.75, 0.25])
    reading = meter.read(before)
    assert (reading.elapsed, reading.seconds) == (4.0, 1.0)
    assert (reading.busy, reading.load) == ((0.75, 0.25), (0.1875, 0.0625))
    assert reading.bubble == 0.5
    assert meter.read().elapsed == 11.0


def test_several_readers_each_read_since_their_own_last_reading():
    clock = Clock()
    meter = BubbleMeter(clock)
    play(meter, clock, 1, 4)
    slow = quick = meter.totals()
    for number in range(4):
        meter.start(1)
        clock.now += 2
        meter.end([2.0 if number == 0 else 0.5])
        reading, quick = meter.read(quick), meter.totals()
        assert reading.load == ((1.0,) if number == 0 else (0.25,))
    assert meter.read(slow).load == (3.5 / 8,)
    assert meter.read(quick).load == (0.0,)
