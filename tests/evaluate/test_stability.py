"""Population stability index against its plain formula, and its size by chance against scipy and simulated windows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import chi2

from finlora.evaluate.stability import chance_index, stability_index


def test_index_is_siddiqis_sum_over_labels():
    expected, found = [600, 300, 100], [300, 300, 400]
    shares = [[(count + 0.5) / 1001.5 for count in counts] for counts in (expected, found)]
    plain = sum((now - then) * math.log(now / then) for then, now in zip(*shares, strict=True))
    assert stability_index(expected, found) == pytest.approx(plain)
    assert plain == pytest.approx(-0.3 * math.log(0.5) + 0.3 * math.log(4), abs=3e-3)  # without half an answer a label
    assert stability_index(found, expected) == pytest.approx(plain)


def test_equal_shares_have_index_0_and_a_label_without_answers_a_finite_one():
    assert stability_index([30, 70], [300, 700]) == pytest.approx(0, abs=1e-4)
    assert 0.2 < stability_index([50, 50, 0], [40, 40, 20]) < 2


@pytest.mark.parametrize("num_labels", [2, 3, 5, 20, 50])
def test_chance_is_the_99_percent_quantile_of_chi_squared(num_labels):
    quantile = chi2.ppf(0.99, num_labels - 1)
    assert chance_index(1000, 100, num_labels) == pytest.approx(quantile * (1 / 1000 + 1 / 100), rel=0.03)
    assert chance_index(1000, 100, 1) == 0


def test_unchanged_windows_seldom_exceed_chance():
    rng = np.random.default_rng(5)
    shares = [0.5, 0.3, 0.15, 0.05]
    windows = zip(rng.multinomial(2000, shares, 1000), rng.multinomial(500, shares, 1000), strict=True)
    above = [stability_index(test.tolist(), now.tolist()) > chance_index(2000, 500, 4) for test, now in windows]
    assert 1 <= sum(above) <= 25
