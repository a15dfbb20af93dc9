"""Bins and expected calibration error against hand-computed cases; temperature against scipy's minimum of the plain loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from finlora.evaluate.calibration import (
    LEAST_TEMPERATURE,
    MOST_TEMPERATURE,
    bin_confidences,
    calibrate_top,
    calibration_error,
    fit_temperature,
)


def test_bins_have_means_of_their_answers_and_empty_bins_are_left_out():
    bins = bin_confidences([0.05, 0.92, 0.98, 1.0, 0.9], [False, True, True, False, True])
    assert [(each["low"], each["high"], each["count"]) for each in bins] == [(0.0, 0.1, 1.0), (0.9, 1.0, 4.0)]
    assert bins[1]["confidence"] == pytest.approx(0.95)
    assert bins[1]["accuracy"] == 0.75


def test_error_weights_bins_by_their_answers():
    bins = bin_confidences([0.05, 0.92, 0.98, 1.0, 0.9], [False, True, True, False, True])
    assert calibration_error(bins) == pytest.approx((1 * 0.05 + 4 * 0.20) / 5)
    assert calibration_error(bin_confidences([1.0, 1.0], [True, True])) == 0.0
    assert math.isnan(calibration_error([]))


def sample_answers(temperature, num=4000, num_choices=4):
    """Probabilities of a model that is too sure by a temperature, and true choices sampled from the calibrated ones."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(num, num_choices)) * 3
    truths = [int(rng.choice(num_choices, p=row)) for row in softmax(logits / temperature, axis=1)]
    return softmax(logits, axis=1), truths


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_is_the_minimum_of_the_plain_loss(temperature):
    probabilities, truths = sample_answers(temperature)

    def loss(value):
        """Mean negative log-likelihood, Guo et al. 2017, section 4.2."""
        return -log_softmax(np.log(probabilities) / value, axis=1)[np.arange(len(truths)), truths].mean()

    found = fit_temperature(probabilities.tolist(), truths)
    assert found == pytest.approx(minimize_scalar(loss, bounds=(0.3, 9), method="bounded").x, rel=1e-3)
    assert found == pytest.approx(temperature, rel=0.1)


def test_calibrated_probabilities_are_right_as_often_as_they_say():
    probabilities, truths = sample_answers(3.0)
    is_right = probabilities.argmax(axis=1) == np.array(truths)
    assert probabilities.max(axis=1).mean() > is_right.mean() + 0.15
    temperature = fit_temperature(probabilities.tolist(), truths)
    calibrated = [calibrate_top(row, temperature) for row in probabilities.tolist()]
    assert calibrated == pytest.approx(softmax(np.log(probabilities) / temperature, axis=1).max(axis=1).tolist())
    assert np.mean(calibrated) == pytest.approx(is_right.mean(), abs=0.01)


def test_temperature_stays_within_its_bounds_and_a_probability_of_0_is_allowed():
    assert fit_temperature([[0.9, 0.1], [0.2, 0.8]], [0, 1]) == pytest.approx(LEAST_TEMPERATURE)
    assert fit_temperature([[0.9, 0.1], [0.2, 0.8]], [1, 0]) == pytest.approx(MOST_TEMPERATURE)
    assert calibrate_top([1.0, 0.0], 2.0) == 1.0
    assert LEAST_TEMPERATURE < fit_temperature([[1.0, 0.0], [0.6, 0.4]], [0, 1]) <= MOST_TEMPERATURE
