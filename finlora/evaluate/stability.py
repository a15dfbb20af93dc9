"""Stability of answers: population stability index (PSI) of the shares of labels, and how large chance alone makes it.

PSI = sum over labels of (found share - expected share) * ln(found share / expected share). Below 0.1 counts as stable, above
0.2 or 0.25 as changed. Source: Siddiqi, Credit Risk Scorecards, 2006, chapter 9. Without any change it is about
(1 / n + 1 / m) times a chi-squared number of K - 1 degrees of freedom, for n and m answers and K labels. Source: Yurdakul,
Statistical Properties of Population Stability Index, 2018, chapter 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_PRIOR = 0.5
"""Added to each count, so that a label without an answer has a logarithm."""
_Z_99 = 2.3263478740408408
"""99 % quantile of the standard normal distribution."""


def stability_index(expected: Sequence[int], found: Sequence[int]) -> float:
    """Return the PSI between two lists of counts.

    Args:
        expected: answers of each label in the reference.
        found: answers of each label now.
    """
    return sum((b - a) * math.log(b / a) for a, b in zip(_shares(expected), _shares(found), strict=True))


def chance_index(num_expected: int, num_found: int, num_labels: int) -> float:
    """Return the PSI that chance alone exceeds once in 100 windows, where nothing has changed.

    The quantile of chi-squared is Wilson and Hilferty's (1931), within 3 % for each number of labels.
    """
    if num_labels < 2:
        return 0.0
    freedom = num_labels - 1
    part = 2 / (9 * freedom)
    return freedom * (1 - part + _Z_99 * math.sqrt(part)) ** 3 * (1 / num_expected + 1 / num_found)


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts) + _PRIOR * len(counts)
    return [(count + _PRIOR) / total for count in counts]
