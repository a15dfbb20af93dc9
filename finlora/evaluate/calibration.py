"""Calibration of label probabilities: are answers given with 80 % right in 80 % of the cases? Corrected by one temperature.

Source: expected calibration error over bins of equal width and temperature scaling, Guo et al. 2017, arXiv:1706.04599, sections
3 and 4.2. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NUM_BINS = 10
LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.25, 10.0
"""Bounds of a fitted temperature. Where all answers are right, the fit would otherwise go to 0 and each probability to 1."""
MAX_FITTED = 2_000_000
"""Probabilities from which a temperature is fitted; of more answers, each n-th one."""
_NUM_HALVINGS = 50
_LEAST_PROBABILITY = 1e-300


def bin_confidences(confidences: Sequence[float], is_right: Sequence[bool]) -> list[dict[str, float]]:
    """Bin answers by their probability, in bins of equal width.

    Returns:
        A record for each bin with answers, lowest first: low and high (bounds), count, confidence and accuracy (means).
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for confidence, right in zip(confidences, is_right, strict=True):
        bins[min(int(confidence * NUM_BINS), NUM_BINS - 1)].append((confidence, right))
    return [
        {
            "low": index / NUM_BINS,
            "high": (index + 1) / NUM_BINS,
            "count": float(len(items)),
            "confidence": sum(confidence for confidence, _ in items) / len(items),
            "accuracy": sum(right for _, right in items) / len(items),
        }
        for index, items in enumerate(bins)
        if items
    ]


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Return the mean distance between confidence and accuracy, bins weighted by count; nan without answers."""
    total = sum(each["count"] for each in bins)
    distances = (each["count"] * abs(each["confidence"] - each["accuracy"]) for each in bins)
    return sum(distances) / total if total else math.nan


def fit_temperature(probabilities: Sequence[Sequence[float]], truths: Sequence[int]) -> float:
    """Return the temperature T at which the true choices of these answers are likeliest, within the bounds above.

    The probability of a choice becomes softmax(log p / T): the logarithm of a probability differs from the logit by a constant
    per answer, which softmax ignores. The mean log-likelihood is concave in 1 / T, so its maximum is found by bisection on the
    derivative, the mean expectation of log p less the mean log p of the true choice.

    Args:
        probabilities: of each answer, over the same choices.
        truths: index of the true choice, one for each answer.
    """
    import numpy as np

    step = spacing_of(len(truths), len(probabilities[0]))
    logs = np.log(np.maximum(np.asarray(probabilities[::step], dtype=np.float64), _LEAST_PROBABILITY))
    logs -= logs.max(axis=1, keepdims=True)
    chosen = logs[np.arange(len(logs)), np.asarray(truths[::step])].mean()

    def slope(inverse: float) -> float:
        weights = np.exp(inverse * logs)
        return float(((weights * logs).sum(axis=1) / weights.sum(axis=1)).mean() - chosen)

    low, high = 1 / MOST_TEMPERATURE, 1 / LEAST_TEMPERATURE
    for _ in range(_NUM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return 2 / (low + high)


def spacing_of(num_answers: int, num_choices: int) -> int:
    """Return n: a temperature is fitted from each n-th answer."""
    return math.ceil(num_answers * num_choices / MAX_FITTED)


def calibrate_top(probabilities: Sequence[float], temperature: float) -> float:
    """Return the calibrated probability of the most probable choice: that of softmax(log p / T)."""
    top = max(probabilities)
    return 1 / math.fsum((value / top) ** (1 / temperature) for value in probabilities)
