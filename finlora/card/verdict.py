"""Verdict on an adapter: its accuracy against its base's and against always the most frequent label, with 95 % intervals.

Where the answers of both were kept, their differences are paired example by example; else the interval is that of two independent
samples, which is wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from finlora.card.evidence import Evidence, Scored
from finlora.evaluate.intervals import accuracy_interval, difference_interval, unpaired_interval, wilson_interval
from finlora.report.scores import find_majority
from finlora.results import Result


@dataclass(frozen=True, kw_only=True, slots=True)
class Gain:
    """Accuracy of the adapter minus that of another answer, as a share."""

    other: str
    """What it is compared with."""
    accuracy: float
    """Of the other."""
    low: float
    """Ends of the other's interval."""
    high: float
    gain: float
    gain_low: float
    gain_high: float
    is_paired: bool

    @property
    def word(self) -> Literal["better than", "worse than", "not shown to differ from"]:
        if self.gain_low > 0:
            return "better than"
        return "worse than" if self.gain_high < 0 else "not shown to differ from"

    @property
    def text(self) -> str:
        """What the verdict says: `better than its base (51.2 %, gain 35.1 points, 31.9 to 38.2)`."""
        gain = f"{_points(self.gain)} points, {_points(self.gain_low)} to {_points(self.gain_high)}"
        return f"{self.word} {self.other} ({100 * self.accuracy:.1f} %; difference {gain})"


def compare_with_base(scored: Scored, seed: int) -> Gain | None:
    """Return the gain over the base; None where the base was not scored on the same questions, at the same bits and method."""
    if scored.base is None or not _has_accuracy(scored.base) or not _has_accuracy(scored.result):
        return None
    own, base, table, base_table = scored.result, scored.base, scored.table, scored.base_table
    is_paired = table is not None and base_table is not None and table.id == base_table.id
    if table is not None and base_table is not None and is_paired:
        low, high = difference_interval(table.is_right, base_table.is_right, table.groups, seed=seed)
    else:
        low, high = unpaired_interval(_accuracy(own), _ends(own), _accuracy(base), _ends(base))
    return Gain(
        other="its base",
        accuracy=_accuracy(base),
        low=_ends(base)[0],
        high=_ends(base)[1],
        gain=_accuracy(own) - _accuracy(base),
        gain_low=low,
        gain_high=high,
        is_paired=is_paired,
    )


def compare_with_majority(scored: Scored, seed: int) -> Gain | None:
    """Return the gain over always the most frequent label of the test split; None where there are no labels."""
    majority, own, table = find_majority(scored.result), scored.result, scored.table
    if majority is None or not _has_accuracy(own):
        return None
    ends = wilson_interval(round(majority.accuracy * own.num_examples), own.num_examples)
    if table is not None:
        always = [label == majority.label for label in table.label]
        ends = accuracy_interval(always, table.groups, seed=seed)
        low, high = difference_interval(table.is_right, always, table.groups, seed=seed)
    else:
        low, high = unpaired_interval(_accuracy(own), _ends(own), majority.accuracy, ends)
    return Gain(
        other=f"always answering {majority.label}",
        accuracy=majority.accuracy,
        low=ends[0],
        high=ends[1],
        gain=_accuracy(own) - majority.accuracy,
        gain_low=low,
        gain_high=high,
        is_paired=table is not None,
    )


def seed_of(result: Result) -> int:
    """Return the seed of an evaluation's resampling."""
    seed = result.config.get("seed", 0)
    return seed if isinstance(seed, int) else 0


def write_verdict(evidence: Evidence) -> list[str]:
    """Return the verdict, one sentence an evaluation."""
    if not evidence.scored:
        where = ", ".join(map(str, evidence.searched))
        return [
            f"Not evaluated: {where} holds no score of exactly these weights. Run `finlora evaluate`, or name its results "
            "with --results."
        ]
    return [_write_sentence(scored, evidence.count_test_rows(scored)) for scored in evidence.scored]


def _write_sentence(scored: Scored, total: int | None) -> str:
    result, seed = scored.result, seed_of(scored.result)
    if not _has_accuracy(result):
        return f"{scored.name}: evaluated without an accuracy."
    low, high = _ends(result)
    rows = "examples that a search held out from the training split" if scored.is_of_search else "test examples"
    whole = f" of {total:,}" if result.is_partial and total else ""
    part = ", only a part of the test split," if result.is_partial and not total else ""
    parts = [
        f"right in {100 * _accuracy(result):.1f} % of {result.num_examples:,}{whole} {rows}{part} (95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f})"
    ]
    base, majority = compare_with_base(scored, seed), compare_with_majority(scored, seed)
    parts.append(base.text if base else "its base was not scored on the same questions, so no gain is shown")
    parts.append(majority.text if majority else "there is no majority answer to compare with")
    return f"{scored.name}: {', '.join(parts[:-1])}, and {parts[-1]}."


def _has_accuracy(result: Result) -> bool:
    return not math.isnan(_accuracy(result))


def _accuracy(result: Result) -> float:
    return result.metrics.get("accuracy", math.nan)


def _ends(result: Result) -> tuple[float, float]:
    value = _accuracy(result)
    return result.metrics.get("accuracy_low", value), result.metrics.get("accuracy_high", value)


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"
