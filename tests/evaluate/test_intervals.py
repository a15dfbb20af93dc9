"""Intervals of differences between two answers on the same items."""

from __future__ import annotations

import random

import pytest

from finlora.evaluate.intervals import difference_interval, unpaired_interval, wilson_interval


def test_unpaired_interval_is_newcombes():
    """Table II of Newcombe 1998, method 10: 56/70 and 48/80 differ by 0.2, from 0.0524 to 0.3339."""
    low, high = unpaired_interval(56 / 70, wilson_interval(56, 70), 48 / 80, wilson_interval(48, 80))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


def test_paired_interval_is_narrower_than_the_unpaired_one_where_both_are_right_together():
    chance = random.Random(1)
    other = [chance.random() < 0.6 for _ in range(400)]
    one = [right or chance.random() < 0.1 for right in other]
    share, others = sum(one) / 400, sum(other) / 400
    low, high = difference_interval(one, other)
    wide = unpaired_interval(share, wilson_interval(sum(one), 400), others, wilson_interval(sum(other), 400))
    assert low > 0 > wide[0]
    assert low < share - others < high
    assert high - low < 0.5 * (wide[1] - wide[0])
    assert difference_interval(other, one) == (pytest.approx(-high, abs=0.01), pytest.approx(-low, abs=0.01))


def test_groups_widen_the_interval_of_a_difference():
    chance = random.Random(2)
    one = [right for right in (chance.random() < 0.7 for _ in range(40)) for _ in range(10)]
    other = [right for right in (chance.random() < 0.5 for _ in range(40)) for _ in range(10)]
    groups = [str(row // 10) for row in range(400)]
    (low, high), (alone_low, alone_high) = difference_interval(one, other, groups), difference_interval(one, other)
    assert high - low > 2 * (alone_high - alone_low)


def test_equal_answers_have_an_interval_with_a_width():
    low, high = difference_interval([True] * 30, [True] * 30)
    assert -0.2 < low < 0 < high < 0.2
    few = difference_interval([True] * 30, [True] * 30, [str(row // 10) for row in range(30)])
    assert few[0] < low
    assert few[1] > high


def test_same_seed_gives_the_same_bounds():
    flags = [row % 3 > 0 for row in range(50)]
    other = [row % 2 > 0 for row in range(50)]
    assert difference_interval(flags, other, seed=3) == difference_interval(flags, other, seed=3)
