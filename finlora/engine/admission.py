"""Admission of requests: limits of the engine, requests in flight, and prefixes that they share in a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from finlora.engine.kv_cache import Extent
from finlora.engine.micro_batch import MicroBatch, Sample, Score
from finlora.engine.request import Request, Token
from finlora.errors import ConfigError

MIN_PREFIX = 16
"""Tokens of common beginning from which a request waits one micro-batch for another that computes them."""
MIN_CHUNK = 512
"""Prompt tokens below which a micro-batch is not cut further to give every stage a part, nor started ahead."""
MIN_AHEAD_CHUNK = 4096
"""Prompt tokens below which a micro-batch is not cut to have one ready ahead: each part reads and unpacks all weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much the engine takes on."""

    cache_rows: int
    """Tokens that the KV cache holds."""
    max_batch_tokens: int = 2048
    """Most rows of a micro-batch."""
    max_waiting: int = 1024
    """Most requests in line."""
    max_in_flight: int = 1
    """Micro-batches under way at once: the number of stages; one more before the first follows them, or has prompts."""
    keeps_prefixes: bool = True
    follows: bool = False
    """Whether the stages can begin with tokens that a micro-batch under way samples (Executor.can_follow)."""

    def __post_init__(self) -> None:
        checks = {"cache_rows": 16, "max_batch_tokens": 1, "max_waiting": 1, "max_in_flight": 1}
        values = {key: getattr(self, key) for key in checks}
        if faults := [
            f"{key}={values[key]}: expected at least {least}" for key, least in checks.items() if values[key] < least
        ]:
            raise ConfigError(faults)


class Beginnings:
    """Beginnings of prompts, found by their length in a time that does not grow with their number."""

    def __init__(self) -> None:
        self._prompts: list[tuple[Request, int]] = []
        self._by_length: dict[int, set[tuple[str | None, tuple[int, ...]]]] = {}

    def add(self, request: Request, num_computed: int) -> None:
        """Count a prompt, of which so many first tokens will be computed."""
        self._prompts.append((request, num_computed))
        for length, found in self._by_length.items():
            if num_computed >= length:
                found.add((request.adapter, request.prompt_ids[:length]))

    def has(self, request: Request, length: int) -> bool:
        """Return whether so many first tokens of a prompt, and fewer than all, are among them for its adapter."""
        if length >= len(request.prompt_ids) or not self._prompts:
            return False
        if length not in self._by_length:
            longer = (other for other, num_computed in self._prompts if num_computed >= length)
            self._by_length[length] = {(other.adapter, other.prompt_ids[:length]) for other in longer}
        return (request.adapter, request.prompt_ids[:length]) in self._by_length[length]


@dataclass(slots=True, eq=False)
class Work:
    """A request that was admitted."""

    request: Request
    extent: Extent
    seed: int
    num_cached: int
    num_computed: int
    """Prompt rows of micro-batches scheduled so far."""
    tokens: list[Token] = field(default_factory=list)
    in_flight: int = 0
    """Micro-batches under way that compute a part of it: one, several chunks of its prompt, or a token and the next one."""

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= len(self.request.prompt_ids)


class Part(NamedTuple):
    """What a micro-batch under way computes of a request."""

    work: Work
    is_complete: bool
    """It brings what the request waits for."""
    sample: int | None
    """Place of its token among the micro-batch's; None where it brings none."""


def add_rows(batch: MicroBatch, work: Work, count: int, sample: int | None = None) -> Part:
    """Add the next rows of a request to a micro-batch, and what is wanted of them.

    Args:
        count: prompt tokens; 0: its last generated token.
        sample: where that token is not known yet, its place among those of the micro-batch that this one follows.
    """
    request, start = work.request, work.extent.start
    size, num_samples = len(request.prompt_ids), len(batch.samples)
    if count == 0:
        place = size + len(work.tokens) - (sample is None)
        last_id = work.tokens[-1].id if sample is None else -1 - sample
        row = batch.add([last_id], place, [start + place], [(start, place + 1)])
        _add_sample(batch, work, row, len(work.tokens) + (sample is not None))
        return Part(work, True, num_samples)
    done, end = work.num_computed, work.num_computed + count
    first = batch.add(request.prompt_ids[done:end], done, range(start + done, start + end), [(start, end)])
    work.num_computed = work.extent.num_ready = end
    if end < size:
        return Part(work, False, None)
    last = first + count - 1
    if not request.choices:
        _add_sample(batch, work, last, 0)
        return Part(work, True, num_samples)
    place = start + size
    for choice in request.choices:
        own = choice[:-1]
        row = last
        batch.scores.append(Score(last, choice[0]))
        if own:
            # The first choice's lie behind the prompt's.
            keys = [(start, size), (place, len(own))] if place > start + size else [(start, size + len(own))]
            row = batch.add(own, size, range(place, place + len(own)), keys)
            batch.scores += [Score(row + index, token) for index, token in enumerate(choice[1:])]
        place += len(own)
    return Part(work, True, None)


def _add_sample(batch: MicroBatch, work: Work, row: int, position: int) -> None:
    sampling = work.request.sampling
    batch.samples.append(Sample(row, sampling.temperature, sampling.top_p, work.seed, position))
