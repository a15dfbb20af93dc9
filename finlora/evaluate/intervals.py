"""95 % intervals of accuracy and weighted F1, with and without clusters. Pure numpy.

Many test items can share one sentence: NER asks 17 paraphrases of each (sentence, entity) pair, Headline nine
questions of each headline. Such items tend to be right or wrong together, so an interval that treats them as independent
would be up to sqrt(17) times too narrow. With `groups`, whole groups are resampled instead of items.

Shapes: R resamples, G groups, C classes; a confusion table is (C, C + 1), whose last column counts every prediction
outside the true classes, unparsable ones included.

Source: E. B. Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927), 209-212;
B. Efron and R. Tibshirani, An Introduction to the Bootstrap (1993), chapter 13 (percentile interval).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Z_95 = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""
NUM_RESAMPLES = 2000
_BLOCK_CELLS = 4_000_000
"""Resampling weights held at once: 32 MB of int64."""


def wilson_interval(successes: float, total: float) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of successes / total; (nan, nan) for total 0.

    Unlike the normal interval it stays inside [0, 1] and has a width at 0 % and 100 %.
    """
    if total <= 0:
        return math.nan, math.nan
    share = successes / total
    z2 = Z_95**2 / total
    centre = (share + z2 / 2) / (1 + z2)
    half = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total)) / (1 + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def accuracy_interval(
    is_correct: Sequence[bool], groups: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of an accuracy.

    Args:
        is_correct: one flag for each test item.
        groups: cluster of each item, see the module docstring. None, or all different: Wilson over the items.
            Otherwise a percentile bootstrap over groups. Where its interval is empty (a single group, all items right,
            or all wrong), Wilson with the number of groups as sample size.
        seed: of the resampling; the same seed gives the same bounds.
    """
    correct = np.asarray(is_correct, dtype=np.int64)
    index, num_groups = _number_groups(groups, len(correct))
    if num_groups == len(correct):
        return wilson_interval(int(correct.sum()), len(correct))
    share = float(correct.mean())
    if num_groups == 1 or share in (0.0, 1.0):
        return wilson_interval(share * num_groups, num_groups)
    table = np.zeros((num_groups, 2), dtype=np.int64)
    np.add.at(table, (index, 1 - correct), 1)
    sums = _resample_groups(table, seed)  # (R, 2)
    return _percentiles(sums[:, 0] / sums.sum(axis=1))


def weighted_f1_interval(
    predictions: Sequence[str | None], labels: Sequence[str], groups: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % percentile-bootstrap interval of the weighted F1; (nan, nan) without items.

    Without clusters each resample is one multinomial sample of the confusion table, which equals the bootstrap over items at
    a cost that does not grow with the test set.
    """
    if not labels:
        return math.nan, math.nan
    classes = {label: column for column, label in enumerate(sorted(set(labels)))}
    num_classes = len(classes)
    rows = np.array([classes[label] for label in labels])
    columns = np.array([num_classes if p is None else classes.get(p, num_classes) for p in predictions])
    cells = rows * (num_classes + 1) + columns
    num_cells = num_classes * (num_classes + 1)
    index, num_groups = _number_groups(groups, len(labels))
    if num_groups == len(labels):
        counts = np.bincount(cells, minlength=num_cells)
        tables = np.random.default_rng(seed).multinomial(len(labels), counts / len(labels), size=NUM_RESAMPLES)
    else:
        table = np.zeros((num_groups, num_cells), dtype=np.int64)
        np.add.at(table, (index, cells), 1)
        tables = _resample_groups(table, seed)
    return _percentiles(weighted_f1_of_tables(tables.reshape(-1, num_classes, num_classes + 1)))


def difference_interval(
    one: Sequence[bool], other: Sequence[bool], groups: Sequence[str] | None = None, *, seed: int = 0
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two accuracies on the same items.

    A percentile bootstrap over the differences of items or groups, which are 1, 0 or -1 an item: what both get right or wrong
    together does not widen it. Where every item differs alike, as in two equal lists, that interval is empty; then it is the
    interval of `unpaired_interval` with the number of groups as sample size.

    Args:
        one: flags of the first, which the second's are subtracted from.
        groups: as in `accuracy_interval`.
        seed: of the resampling.
    """
    differences = np.asarray(one, dtype=np.int64) - np.asarray(other, dtype=np.int64)
    index, num_groups = _number_groups(groups, len(differences))
    if len(set(differences.tolist())) == 1:
        shares = float(np.mean(one)), float(np.mean(other))
        first, second = (wilson_interval(share * num_groups, num_groups) for share in shares)
        return unpaired_interval(shares[0], first, shares[1], second)
    if num_groups == len(differences):
        counts = np.bincount(differences + 1, minlength=3)
        tables = np.random.default_rng(seed).multinomial(
            len(differences), counts / len(differences), size=NUM_RESAMPLES
        )
        return _percentiles((tables[:, 2] - tables[:, 0]) / len(differences))
    table = np.zeros((num_groups, 2), dtype=np.int64)
    np.add.at(table[:, 0], index, differences)
    np.add.at(table[:, 1], index, 1)
    sums = _resample_groups(table, seed)
    return _percentiles(sums[:, 0] / sums[:, 1])


def unpaired_interval(
    one: float, own: tuple[float, float], other: float, others: tuple[float, float]
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares from their own intervals, as of independent samples.

    Source: R. G. Newcombe, Interval estimation for the difference between independent proportions, Statistics in Medicine 17
    (1998), 873-890, method 10.
    """
    below = math.hypot(one - own[0], others[1] - other)
    above = math.hypot(own[1] - one, other - others[0])
    return one - other - below, one - other + above


def weighted_f1_of_tables(tables: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the weighted F1 of each confusion table (R, C, C + 1): sum over classes of support / total * F1."""
    num_classes = tables.shape[1]
    hits = np.diagonal(tables, axis1=1, axis2=2).astype(np.float64)  # (R, C)
    support = tables.sum(axis=2).astype(np.float64)
    predicted = tables[:, :, :num_classes].sum(axis=1)
    # 2 TP / (2 TP + FP + FN); a class neither present nor predicted has weight 0 and must not divide by 0.
    f1 = 2 * hits / np.maximum(support + predicted, 1)
    scores: NDArray[np.float64] = (f1 * support).sum(axis=1) / support.sum(axis=1)
    return scores


def _number_groups(groups: Sequence[str] | None, num_items: int) -> tuple[NDArray[np.int64], int]:
    if groups is None:
        return np.arange(num_items), num_items
    if len(groups) != num_items:
        raise ValueError(f"{len(groups)} groups for {num_items} items: expected one group for each item")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(group, len(numbers)) for group in groups], dtype=np.int64), len(numbers)


def _resample_groups(table: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Sum the rows of table (G, K) over R resamples of G groups with replacement: (R, K)."""
    num_groups = len(table)
    generator = np.random.default_rng(seed)
    chances = np.full(num_groups, 1 / num_groups)
    block = max(1, min(NUM_RESAMPLES, _BLOCK_CELLS // num_groups))
    sums = []
    for start in range(0, NUM_RESAMPLES, block):
        weights = generator.multinomial(num_groups, chances, size=min(block, NUM_RESAMPLES - start))
        # float64 goes through BLAS and is exact here: every sum stays far below 2**53.
        sums.append(weights.astype(np.float64) @ table.astype(np.float64))
    return np.rint(np.concatenate(sums)).astype(np.int64)


def _percentiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
