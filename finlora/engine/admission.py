"""Admission of requests: limits of the engine, requests in flight, and prefixes that they share in a micro-batch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from finlora.engine.kv_cache import Extent
from finlora.engine.micro_batch import Filters, MicroBatch, Sample, Score
from finlora.engine.request import Request, Sampling, Token
from finlora.errors import ConfigError

MIN_PREFIX = 16
"""Length of a shared prefix from which a request waits one micro-batch for another one to compute it."""
MIN_CHUNK = 512
"""Prompt tokens below which a micro-batch is not cut further to give every stage a part, nor started ahead."""
MIN_AHEAD_CHUNK = 4096
"""Prompt tokens below which a micro-batch is not cut to have one ready ahead: each part reads and unpacks all weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Most that the engine accepts and computes at once."""

    cache_rows: int
    """Tokens that the KV cache holds."""
    max_batch_tokens: int = 2048
    """Most rows of a micro-batch."""
    max_waiting: int = 1024
    """Most requests in the queue."""
    max_in_flight: int = 1
    """Micro-batches in flight at once: the number of stages; one more waits if it follows, or has prompts."""
    keeps_prefixes: bool = True
    follows: bool = False
    """Whether a micro-batch can start from tokens that one in flight is about to sample (Executor.can_follow)."""

    def __post_init__(self) -> None:
        checks = {"cache_rows": 16, "max_batch_tokens": 1, "max_waiting": 1, "max_in_flight": 1}
        values = {key: getattr(self, key) for key in checks}
        if faults := [
            f"{key}={values[key]}: expected at least {least}" for key, least in checks.items() if values[key] < least
        ]:
            raise ConfigError(faults)


class Prefixes:
    """Prefixes of prompts that a micro-batch computes; a look-up takes the same time for any number of them."""

    def __init__(self) -> None:
        self._prompts: list[tuple[Request, int]] = []
        self._by_length: dict[int, set[tuple[str | None, tuple[int, ...]]]] = {}

    def add(self, request: Request, num_computed: int) -> None:
        """Add a prompt, of which the first `num_computed` tokens will be computed."""
        self._prompts.append((request, num_computed))
        for length, found in self._by_length.items():
            if num_computed >= length:
                found.add((request.adapter, request.prompt_ids[:length]))

    def has(self, request: Request, length: int) -> bool:
        """Return whether the first `length` tokens of a prompt, but not all of them, are such a prefix for its adapter."""
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
    matcher: int | None = None
    """Number of its matcher at the last stage; None: it has no grammar."""
    filters: Filters | None = None
    """Of its samples; None: plain ones."""
    early_filters: Filters | None = None
    """Of its first min_tokens samples: they forbid the end token."""
    tokens: list[Token] = field(default_factory=list)
    in_flight: int = 0
    """Micro-batches in flight that compute a part of it: one, several chunks of its prompt, or a token and the next one."""

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= len(self.request.prompt_ids)


class Part(NamedTuple):
    """The part of a request that a micro-batch in flight computes."""

    work: Work
    is_complete: bool
    """Whether it yields a token or the scores of the choices."""
    sample: int | None
    """Index of its token among the micro-batch's samples; None: it samples none."""


def make_filters(sampling: Sampling, end_token_id: int) -> tuple[Filters | None, Filters | None]:
    """Return the filters of a request's samples, and of those before its min_tokens."""
    later = Filters(sampling.top_k, sampling.min_p, sampling.logit_bias, sampling.num_top)
    early = later._replace(bias=(*sampling.logit_bias, (end_token_id, -math.inf)))
    return (later if later != Filters() else None), early


def add_rows(batch: MicroBatch, work: Work, count: int, sample: int | None = None) -> Part:
    """Add the next rows of a request to a micro-batch, and the samples and scores that it needs of them.

    Args:
        count: prompt tokens; 0: its last generated token.
        sample: if that token is not known yet, its index among the samples of the micro-batch that this one follows.
    """
    request, start = work.request, work.extent.start
    size, num_samples = len(request.prompt_ids), len(batch.samples)
    if count == 0:
        position = size + len(work.tokens) - (sample is None)
        last_id = work.tokens[-1].id if sample is None else -1 - sample
        row = batch.add([last_id], position, [start + position], [(start, position + 1)])
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
    slot = start + size
    for choice in request.choices:
        own = choice[:-1]
        row = last
        batch.scores.append(Score(last, choice[0]))
        if own:
            # The first choice's rows follow the prompt's.
            keys = [(start, size), (slot, len(own))] if slot > start + size else [(start, size + len(own))]
            row = batch.add(own, size, range(slot, slot + len(own)), keys)
            batch.scores += [Score(row + index, token) for index, token in enumerate(choice[1:])]
        slot += len(own)
    return Part(work, True, None)


def _penalise(work: Work) -> Iterator[tuple[int, float]]:
    """Return the biases of a request's tokens so far (https://platform.openai.com/docs/api-reference: penalties)."""
    sampling = work.request.sampling
    for token, count in Counter(token.id for token in work.tokens).items():
        yield token, -(sampling.presence_penalty + count * sampling.frequency_penalty)


def _add_sample(batch: MicroBatch, work: Work, row: int, position: int) -> None:
    sampling = work.request.sampling
    filters = work.early_filters if position < sampling.min_tokens else work.filters
    if sampling.has_penalty and work.tokens:
        # All tokens before are known: a request with a penalty has no speculative row.
        filters = filters or Filters()
        filters = filters._replace(bias=(*filters.bias, *_penalise(work)))
    batch.samples.append(Sample(row, sampling.temperature, sampling.top_p, work.seed, position, work.matcher, filters))
    if work.matcher is not None and position == 0:
        batch.grammars.append((work.matcher, sampling.grammar))
