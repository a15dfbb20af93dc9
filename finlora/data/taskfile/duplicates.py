"""Groups of equal and nearly equal texts: banded MinHash of character 5-grams, each candidate checked by its Jaccard index.

Written in numpy: datasketch hashes each 5-gram in a Python call, and normalisation, exact check and groups would be needed
beside it. Source of the method: Broder 1997, doi 10.1109/SEQUEN.1997.666900; banding: Leskovec, Rajaraman, Ullman, Mining of
Massive Datasets, section 3.4. With 20 bands of 5 rows, a pair of Jaccard index 0.8 is found with probability 0.9996.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SIMILARITY = 0.8
"""Least Jaccard index of the 5-grams of two texts that are nearly equal."""
_GRAM = 5
_BANDS, _ROWS = 20, 5
_MAX_PARTNERS = 20
"""First texts of a bucket, with which each later one is compared."""
_BLOCK_GRAMS = 2**16
"""5-grams hashed at once: 512 KiB, which fit in a core's cache."""
_DIGIT = re.compile(r"\d")


class Groups:
    """Union-find over row indices."""

    def __init__(self, num_rows: int) -> None:
        self._parents = list(range(num_rows))

    def find(self, row: int) -> int:
        """Return the smallest row of a row's group."""
        root = row
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[row] != root:
            self._parents[row], row = root, self._parents[row]
        return root

    def join(self, one: int, other: int) -> None:
        first, second = sorted((self.find(one), self.find(other)))
        self._parents[second] = first

    def join_equal(self, keys: Iterable[Hashable | None]) -> None:
        """Join the rows of equal keys; a row whose key is None stays alone."""
        seen: dict[Hashable, int] = {}
        for row, key in enumerate(keys):
            if key is not None:
                self.join(seen.setdefault(key, row), row)

    def copy(self) -> Groups:
        found = Groups(0)
        found._parents = list(self._parents)
        return found

    def roots(self) -> list[int]:
        return [self.find(row) for row in range(len(self._parents))]


def normalise(text: str) -> str:
    """Return a text in the form that is compared: lower case, each digit a 0, white space as one blank."""
    return _DIGIT.sub("0", " ".join(text.lower().split()))


def group_duplicates(texts: Sequence[str]) -> Groups:
    """Return groups of texts that are equal or nearly equal after normalisation, directly or through other texts."""
    groups = Groups(len(texts))
    distinct: dict[str, int] = {}
    for row, text in enumerate(texts):
        groups.join(distinct.setdefault(normalise(text), row), row)
    rows = list(distinct.values())
    for one, other in _find_alike(list(distinct)):
        groups.join(rows[one], rows[other])
    return groups


def _find_alike(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs of indices of nearly equal texts: not every pair of a group, but enough to connect it."""
    import numpy as np

    rng = np.random.default_rng(20_260_101)
    factors = rng.integers(1, 2**63, (_BANDS * _ROWS, 1), np.uint64) * np.uint64(2) + np.uint64(1)
    long = [index for index, text in enumerate(texts) if len(text) >= _GRAM]
    bands = []
    for block in _cut(long, texts):
        grams = [_hash_grams(texts[index]) for index in block]
        starts = np.cumsum([0, *(len(own) for own in grams[:-1])])
        whole = np.concatenate(grams)
        band = np.zeros((len(block), _BANDS), np.uint64)
        for number, factor in enumerate(factors):
            least = np.minimum.reduceat(whole * factor, starts)
            band[:, number // _ROWS] = _mix(band[:, number // _ROWS] ^ least)
        bands.append(band)
    if not bands:
        return
    found = Groups(len(texts))
    kept: dict[int, NDArray[np.uint64]] = {}
    for row, other_row in _list_candidates(np.concatenate(bands)):
        index, other = long[row], long[other_row]
        if found.find(index) != found.find(other):
            for each in (index, other):
                if each not in kept:
                    kept[each] = np.unique(_hash_grams(texts[each]))
            if _jaccard(kept[index], kept[other]) >= SIMILARITY:
                found.join(index, other)
                yield index, other


def _list_candidates(bands: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Yield pairs of rows with an equal hash in some band. In a large bucket, each row is paired with the first ones only.

    Shapes: bands (rows, _BANDS), each a hash of the signature's values in that band.
    """
    import numpy as np

    for band in bands.T:
        order = np.argsort(band, kind="stable")
        ends = np.flatnonzero(band[order][1:] != band[order][:-1]) + 1
        for bucket in np.split(order, ends):
            if len(bucket) > 1:
                rows = bucket.tolist()
                for number, row in enumerate(rows):
                    yield from ((first, row) for first in rows[: min(number, _MAX_PARTNERS)])


def _cut(indices: Sequence[int], texts: Sequence[str]) -> Iterator[list[int]]:
    block: list[int] = []
    size = 0
    for index in indices:
        block.append(index)
        size += len(texts[index])
        if size >= _BLOCK_GRAMS:
            yield block
            block, size = [], 0
    if block:
        yield block


def _hash_grams(text: str) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each 5-gram of a text's code points."""
    import numpy as np

    points = np.frombuffer(text.encode("utf-32-le", "replace"), np.uint32).astype(np.uint64)
    hashes = np.zeros(len(points) - _GRAM + 1, np.uint64)
    for offset in range(_GRAM):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + points[offset : offset + len(hashes)]
    return _mix(hashes)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return values with their high bits folded into the low ones (the finaliser of SplitMix64, one round)."""
    import numpy as np

    return (values ^ (values >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


def _jaccard(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    import numpy as np

    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)
