"""Continuous batching with chunked prefill over a pipeline with several micro-batches in flight.

Pure bookkeeping: no torch, no clock of its own. A request waits in its client's queue until the cache has room for all rows that
the request may need. Then its prompt is computed in chunks, and it decodes one token per micro-batch until it ends. K stages are
kept busy by K micro-batches: tokens of different requests, or consecutive chunks of one prompt.

One more micro-batch may follow the oldest in flight before its tokens are known: the first stage gets them from the last as soon
as they are sampled, without the scheduler. If such a token ends its request, the request's speculative row is discarded. A
following micro-batch would delay new prompts, so none is made while there are any.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from operator import attrgetter

from finlora.engine.admission import (
    MIN_AHEAD_CHUNK,
    MIN_CHUNK,
    MIN_PREFIX,
    Limits,
    Part,
    Prefixes,
    Work,
    add_rows,
    make_filters,
)
from finlora.engine.kv_cache import ExtentPool
from finlora.engine.micro_batch import MicroBatch, Output
from finlora.engine.request import Answer, Finish, Request, Token
from finlora.errors import ConfigError, QueueFullError


class Scheduler:
    """All requests between submission and answer.

    Args:
        end_token_id: ends a generated answer.
        make_seed: returns a seed for a request without one.
    """

    def __init__(self, limits: Limits, end_token_id: int, make_seed: Callable[[], int]) -> None:
        self.limits, self.end_token_id, self._make_seed = limits, end_token_id, make_seed
        self.pool = ExtentPool(limits.cache_rows, keeps_prefixes=limits.keeps_prefixes)
        self._queues: OrderedDict[str, deque[Request]] = OrderedDict()
        self._active: OrderedDict[str, Work] = OrderedDict()
        self._in_flight: dict[int, list[Part]] = {}
        self._with_prompts: set[int] = set()  # numbers of micro-batches in flight
        self._has_room = True  # for the next request in the queue, as of the last try
        self._copies: list[tuple[int, int, int]] = []
        self._number, self._cached_share = 0, 0.0  # moving average over admitted prompts
        self._matchers, self._released = itertools.count(), list[int]()  # of requests with a grammar

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_prefilled(self) -> int:
        """Active requests whose whole prompt is computed or in flight."""
        return sum(work.is_prefilled for work in self._active.values())

    @property
    def num_in_flight(self) -> int:
        """Micro-batches in flight."""
        return len(self._in_flight)

    def submit(self, request: Request) -> None:
        """Add a request to its client's queue.

        Raises:
            ConfigError: it has no prompt or an id that is in use, or can never fit the cache.
            QueueFullError: too many are waiting.
        """
        if not request.prompt_ids or not all(request.choices):
            raise ConfigError(
                f"request {request.id}: expected at least one token in its prompt and in each of its choices"
            )
        waiting = chain.from_iterable(self._queues.values())
        if request.id in self._active or any(request.id == other.id for other in waiting):
            raise ConfigError(f"request {request.id}: a request with this id is waiting or active, expected a new id")
        if request.num_tokens > self.pool.num_rows:
            raise ConfigError(
                f"request {request.id} can need {request.num_tokens:,} tokens of cache, which has {self.pool.num_rows:,}: "
                "shorten the prompt, lower max_tokens, or give the engine a larger cache"
            )
        if self.num_waiting >= self.limits.max_waiting:
            raise QueueFullError(f"{self.num_waiting:,} requests are waiting, which is the limit: try again later")
        self._queues.setdefault(request.client, deque()).append(request)

    def end(self, request_id: str, finish: Finish) -> Answer | None:
        """End a request early and return its answer; None: it has ended already."""
        for queue in self._queues.values():
            for request in queue:
                if request.id == request_id:
                    self._has_room = True  # the client's next request may fit
                    queue.remove(request)
                    return Answer(request_id=request_id, finish=finish)
        work = self._active.get(request_id)
        # Its rows in flight are computed before those of the next owner of its extent (finlora/engine/kv_cache.py).
        return None if work is None else self._finish(work, finish)

    def uses_adapter(self, name: str) -> bool:
        """Return whether a waiting or active request uses the adapter."""
        return any(request.adapter == name for request in self._requests())

    def forget_prefixes(self) -> None:
        """Drop all kept prefixes and what was learnt of them, so that later answers do not depend on earlier requests."""
        self.pool.forget_all()
        self._cached_share = 0.0  # it decides how prompts are split over several stages

    def forget_adapter(self, name: str) -> None:
        """Drop the kept prefixes of an adapter: another one may be loaded under its name."""
        self.pool.forget(name)

    def expire(self, now: float) -> list[Answer]:
        """End the requests whose deadline has passed."""
        late = [request.id for request in self._requests() if request.deadline is not None and request.deadline < now]
        return [answer for name in late if (answer := self.end(name, "deadline")) is not None]

    def next_batch(self) -> MicroBatch | None:
        """Return the next micro-batch; None: nothing can be computed now."""
        is_full = len(self._in_flight) >= self.limits.max_in_flight
        followers = self._find_followers()
        if is_full and not followers and not self._may_go_ahead():
            return None
        # If a stage is free, requests with known tokens come first: after followers they would also wait for the followed tokens.
        chosen = self._choose(followers if is_full else {}) or (self._choose(followers) if followers else [])
        if not chosen:
            return None
        # Copies stay in the order of admission: one may read rows that the next one overwrites.
        batch, self._copies = MicroBatch(self._number, copies=self._copies), []
        batch.released, self._released = self._released, []
        if any(work in followers for work, _ in chosen):
            batch.follows = next(iter(self._in_flight))
        # Rows of one adapter are contiguous; the base alone comes first.
        chosen.sort(key=lambda item: item[0].request.adapter or "")
        parts = self._in_flight[batch.number] = []
        for work, count in chosen:
            before = batch.num_rows
            parts.append(add_rows(batch, work, count, followers.get(work)))
            adapter, rows = work.request.adapter, batch.num_rows - before
            if batch.adapters and batch.adapters[-1][0] == adapter:
                batch.adapters[-1] = (adapter, batch.adapters[-1][1] + rows)
            else:
                batch.adapters.append((adapter, rows))
            work.in_flight += 1
            if count:
                self._with_prompts.add(batch.number)
        self._number += 1
        return batch

    def complete(self, output: Output) -> tuple[list[tuple[str, Token]], list[Answer]]:
        """Record a micro-batch's results; returns the new tokens by request id, and the answers of requests that ended."""
        tokens, log_probs = iter(output.tokens), iter(output.log_probs)
        tops, faults = dict(output.tops), dict(output.faults)
        new: list[tuple[str, Token]] = []
        answers: list[Answer] = []
        self._with_prompts.discard(output.number)
        for part in self._in_flight.pop(output.number):
            work, request = part.work, part.work.request
            work.in_flight -= 1
            is_over = self._active.get(request.id) is not work
            if not part.is_complete:
                continue
            if part.sample is None:
                sums = [sum(next(log_probs) for _ in choice) for choice in request.choices]
                if not is_over:
                    answers.append(self._finish(work, "choice", sums))
                continue
            token = Token(*next(tokens), tops.get(part.sample, ()))
            if is_over:
                continue
            if part.sample in faults:
                answers.append(dataclasses.replace(self._finish(work, "grammar"), fault=faults[part.sample]))
                continue
            if token.id == self.end_token_id and not request.sampling.ignore_end:
                answers.append(self._finish(work, "end"))
                continue
            work.tokens.append(token)
            new.append((request.id, token))
            if len(work.tokens) >= request.sampling.max_tokens:
                answers.append(self._finish(work, "length"))
        return new, answers

    def _requests(self) -> Iterator[Request]:
        yield from chain.from_iterable(self._queues.values())
        yield from (work.request for work in self._active.values())

    def _finish(self, work: Work, finish: Finish, log_probs: Sequence[float] = ()) -> Answer:
        del self._active[work.request.id]
        if work.is_prefilled and work.tokens:  # the last token was sampled, but its key is not computed
            work.extent.ids = (*work.request.prompt_ids, *(token.id for token in work.tokens[:-1]))
            work.extent.num_ready = len(work.extent.ids)
        self.pool.release(work.extent)
        self._has_room = True
        if work.matcher is not None:
            self._released.append(work.matcher)
        return Answer(
            request_id=work.request.id,
            finish=finish,
            tokens=tuple(work.tokens),
            log_probs=tuple(log_probs),
            num_cached=work.num_cached,
        )

    def _find_followers(self) -> dict[Work, int]:
        """Return the requests that can follow a token that the oldest micro-batch samples, with the index of that sample."""
        is_open = self.limits.follows and 0 < self.num_in_flight <= self.limits.max_in_flight
        has_prompts = self._with_prompts or (self._has_room and self.num_waiting)
        if not is_open or has_prompts or self.num_prefilled < self.num_active:
            return {}
        return {
            work: sample
            for work, _, sample in next(iter(self._in_flight.values()))
            if sample is not None
            and work.in_flight == 1
            and len(work.tokens) + 1 < work.request.sampling.max_tokens
            and not work.request.sampling.has_penalty
            and self._active.get(work.request.id) is work
        }

    def _choose(self, followers: Container[Work]) -> list[tuple[Work, int]]:
        """Return (request, prompt tokens to compute) pairs; 0 tokens: compute its last generated token."""
        chosen, budget = list[tuple[Work, int]](), self.limits.max_batch_tokens
        active = self._active.values()
        ready = [work for work in active if work in followers or (work.is_prefilled and not work.in_flight)]
        # Split evenly over the micro-batches in flight: if the first one took all, the other stages would idle.
        share = -(-self.num_prefilled // self.limits.max_in_flight)
        for work in ready[: min(share, budget)]:
            chosen.append((work, 0))
            budget -= 1
            self._active.move_to_end(work.request.id)
        prompts = [work for work in active if not work.is_prefilled]
        whole = budget = self._cut(budget)
        prefixes = Prefixes()
        for work in prompts:
            budget = self._take_prompt(chosen, prefixes, work, budget)
        while budget > 0 and (new := self._admit(prefixes, budget, whole)) is not None:
            budget = self._take_prompt(chosen, prefixes, new, budget)
        return chosen

    def _may_go_ahead(self) -> bool:
        """Return whether a micro-batch may queue at the first stage: it has many rows and delays no decode step."""
        is_free = len(self._in_flight) <= self.limits.max_in_flight and not self.is_decoding
        return is_free and self._count_prompt_tokens(MIN_CHUNK, attrgetter("num_computed")) >= MIN_CHUNK

    @property
    def is_decoding(self) -> bool:
        """Whether a request generates text."""
        return any(work.is_prefilled and not work.request.choices for work in self._active.values())

    def _cut(self, budget: int) -> int:
        """Return how many prompt tokens to compute now, so that each stage gets a part of all."""
        most = self.limits.max_in_flight
        # Prompts that have started count in full, so that their chunks stay equal.
        rest = self._count_prompt_tokens(
            budget * (most + 1), attrgetter("num_cached"), 1 - self._cached_share * (most > 1)
        )
        part = max(MIN_CHUNK, -(-rest // most))
        if not self.is_decoding:
            part = min(part, max(MIN_AHEAD_CHUNK, -(-rest // max(1, most + 1 - len(self._in_flight)))))
        return min(budget, part)

    def _count_prompt_tokens(self, enough: int, done: Callable[[Work], int], share: float = 1.0) -> int:
        """Return the remaining tokens of active prompts plus a share of waiting ones; stops counting at `enough`."""
        active = self._active.values()
        started = (len(work.request.prompt_ids) - done(work) for work in active if not work.is_prefilled)
        waiting = (math.ceil(share * len(request.prompt_ids)) for queue in self._queues.values() for request in queue)
        rest = 0
        for length in chain(started, waiting):
            rest += length
            if rest >= enough:
                break
        return rest

    def _take_prompt(self, chosen: list[tuple[Work, int]], prefixes: Prefixes, work: Work, budget: int) -> int:
        """Add as much of a prompt as the budget allows; return the rest of the budget. Choices join the last chunk, uncounted."""
        count = min(budget, len(work.request.prompt_ids) - work.num_computed)
        if count > 0:
            chosen.append((work, count))
            prefixes.add(work.request, work.num_computed + count)
        return budget - count

    def _admit(self, prefixes: Prefixes, budget: int, whole: int) -> Work | None:
        """Admit the next client's first request; None: no request, no room, or it should wait for the next micro-batch."""
        while self._queues and not next(iter(self._queues.values())):
            self._queues.popitem(last=False)
        if not self._queues:
            return None
        client, queue = next(iter(self._queues.items()))
        request = queue[0]
        source, length = self.pool.find(request.adapter, request.prompt_ids)
        if self.limits.keeps_prefixes and prefixes.has(request, length + MIN_PREFIX):
            return None  # a prompt of this micro-batch has its prefix; the next micro-batch can copy those rows
        # Attention over chunks runs at half the speed, and one stage alone gains nothing from chunks.
        if self.limits.max_in_flight == 1 and budget < len(request.prompt_ids) - length <= whole >= 2 * budget:
            return None
        extent = self.pool.allocate(request.adapter, request.prompt_ids, request.num_tokens, source)
        if extent is None and not self._active:  # the kept prefix takes the room, and no request will free rows
            source, length = None, 0
            extent = self.pool.allocate(request.adapter, request.prompt_ids, request.num_tokens, None)
        if extent is None:
            self._has_room = False
            return None
        queue.popleft()
        self._queues.move_to_end(client)
        if source is not None:
            self._copies.append((source.start, extent.start, length))
            self.pool.touch(source)
        extent.num_ready = length
        self._cached_share += 0.1 * (length / len(request.prompt_ids) - self._cached_share)
        seed = request.sampling.seed if request.sampling.seed is not None else self._make_seed()
        matcher = next(self._matchers) if request.sampling.grammar else None
        filters = make_filters(request.sampling, self.end_token_id)
        work = self._active[request.id] = Work(request, extent, seed, length, length, matcher, *filters)
        return work
