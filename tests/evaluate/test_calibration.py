"""Bins and expected calibration error against hand-computed cases."""

from __future__ import annotations

import math

import pytest

from finlora.evaluate.calibration import bin_confidences, calibration_error


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
