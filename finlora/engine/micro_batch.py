"""One pass through all stages: tokens, slots of their keys, and samples and scores to return. Plain numbers, no torch.

Rows of a micro-batch are the tokens to compute: several requests' one after the other, those of one adapter together. High-volume
records are NamedTuples: every stage unpickles them, and a frozen dataclass with slots takes four times as long.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Segment(NamedTuple):
    """Rows of one request that attend causally: the last row sees all keys, the one before all but the last, and so on."""

    num_rows: int
    keys: tuple[tuple[int, int], ...]
    """Cache rows as (start, count), in the order of their tokens; the last `num_rows` of them are the segment's own."""


class Filters(NamedTuple):
    """What few requests ask for when a token is sampled."""

    top_k: int = 0
    """Only the likeliest top_k tokens are sampled; 0: all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability are sampled."""
    bias: tuple[tuple[int, float], ...] = ()
    """(token, number added to its logit)."""
    num_top: int = 0
    """Likeliest tokens that are returned with their log-probabilities."""


class Sample(NamedTuple):
    """A token to be sampled."""

    row: int
    """Row whose logits predict it."""
    temperature: float
    top_p: float
    seed: int
    position: int
    """Tokens that its request has generated so far."""
    matcher: int | None = None
    """Number of the request's matcher at the last stage, whose grammar masks the logits; None: any token may be sampled."""
    filters: Filters | None = None


class Score(NamedTuple):
    """A token whose log-probability is returned."""

    row: int
    token: int


@dataclass(slots=True)
class MicroBatch:
    """Rows of a pass; the scheduler appends to it."""

    number: int
    input_ids: list[int] = field(default_factory=list)
    """-1 - D is a placeholder of sampled token D of the previous micro-batch."""
    follows: int | None = None
    """Number of a micro-batch in flight whose tokens are not known yet."""
    positions: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    """Cache row to which each row's key and value are written."""
    segments: list[Segment] = field(default_factory=list)
    adapters: list[tuple[str | None, int]] = field(default_factory=list)
    """(adapter, rows) in the order of the rows."""
    copies: list[tuple[int, int, int]] = field(default_factory=list)
    """(from, to, count) of cache rows, copied before anything is computed."""
    grammars: list[tuple[int, str]] = field(default_factory=list)
    """(number, grammar) of matchers that begin with a sample of this micro-batch (finlora/stage/grammar_masks.py)."""
    released: list[int] = field(default_factory=list)
    """Numbers of matchers whose requests have ended."""
    samples: list[Sample] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.input_ids)

    def add(self, ids: Sequence[int], start: int, slots: Sequence[int], keys: Sequence[tuple[int, int]]) -> int:
        """Append a segment whose first token has position `start`; returns its first row."""
        first = self.num_rows
        self.input_ids += ids
        self.positions += range(start, start + len(ids))
        self.slots += slots
        self.segments.append(Segment(len(ids), tuple(keys)))
        return first


@dataclass(frozen=True, slots=True)
class Output:
    """Results of a micro-batch, in the order of its samples and scores."""

    number: int
    tokens: Sequence[tuple[int, float]]
    """(token, log-probability) of each sample."""
    log_probs: Sequence[float]
    """Of each score."""
    stage_seconds: Sequence[float] = ()
    """How long each stage computed."""
    tops: Sequence[tuple[int, tuple[tuple[int, float], ...]]] = ()
    """(index, (token, log-probability) of the likeliest, likeliest first) of samples that ask for them."""
    faults: Sequence[tuple[int, str]] = ()
    """(index, reason) of samples without a meaning, since their grammar became too large to follow."""
