"""Calibration of label probabilities: are answers given with 80 % right in 80 % of the cases? No torch.

Source: expected calibration error over bins of equal width, Guo et al. 2017, arXiv:1706.04599, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

NUM_BINS = 10


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
