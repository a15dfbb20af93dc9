"""Which tokens are computed next: continuous batching with chunked prefill, over a pipeline with several passes in flight.

Pure bookkeeping, no torch, no clock of its own. A request waits in its client's line, is admitted when the cache has rows for
all that it can need, has its prompt computed in chunks, and then one token a micro-batch until it ends. With K stages, K
micro-batches keep all of them at work: tokens of different requests, or chunks of one prompt that follow each other.

One more may follow the oldest under way before its tokens are known: the first stage begins with them as soon as the last has
sampled them, without a way through here. A request that one of them ends has a row too many in it, which counts for nothing. It
would stand before new prompts, so none follows where there are any.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from operator import attrgetter

from finlora.engine.admission import MIN_AHEAD_CHUNK, MIN_CHUNK, MIN_PREFIX, Beginnings, Limits, Part, Work, add_rows
from finlora.engine.kv_cache import ExtentPool
from finlora.engine.micro_batch import MicroBatch, Output
from finlora.engine.request import Answer, Finish, Request, Token
from finlora.errors import ConfigError, QueueFullError


class Scheduler:
    """All requests between submission and answer.

    Args:
        end_token_id: ends a generated answer.
        make_seed: gives a seed to a request without one.
    """

    def __init__(self, limits: Limits, end_token_id: int, make_seed: Callable[[], int]) -> None:
        self.limits, self.end_token_id, self._make_seed = limits, end_token_id, make_seed
        self.pool = ExtentPool(limits.cache_rows, keeps_prefixes=limits.keeps_prefixes)
        self._lines: OrderedDict[str, deque[Request]] = OrderedDict()
        self._active: OrderedDict[str, Work] = OrderedDict()
        self._in_flight: dict[int, list[Part]] = {}
        self._with_prompts: set[int] = set()  # micro-batches under way
        self._has_room = True  # for the next request in line, as far as it was tried
        self._copies: list[tuple[int, int, int]] = []
        self._number, self._cached_share = 0, 0.0  # the share is of the last prompts' tokens

    @property
    def num_waiting(self) -> int:
        return sum(len(line) for line in self._lines.values())

    @property
    def num_active(self) -> int:
        return len(self._active)

    @property
    def num_prefilled(self) -> int:
        """Requests at work whose prompt is computed, or on its way."""
        return sum(work.is_prefilled for work in self._active.values())

    @property
    def num_in_flight(self) -> int:
        """Micro-batches under way."""
        return len(self._in_flight)

    def submit(self, request: Request) -> None:
        """Put a request in line.

        Raises:
            ConfigError: it has no prompt, an id that is in use, or can never fit the cache.
            QueueFullError: too many are waiting.
        """
        if not request.prompt_ids or not all(request.choices):
            raise ConfigError(
                f"request {request.id}: expected at least one token in its prompt and in each of its choices"
            )
        waiting = chain.from_iterable(self._lines.values())
        if request.id in self._active or any(request.id == other.id for other in waiting):
            raise ConfigError(f"request {request.id}: a request of this id is at work already, expected a new one")
        if request.num_tokens > self.pool.num_rows:
            raise ConfigError(
                f"request {request.id} can need {request.num_tokens:,} tokens of cache, {self.pool.num_rows:,} are there: "
                "shorten the prompt, lower max_tokens, or give the engine a larger cache"
            )
        if self.num_waiting >= self.limits.max_waiting:
            raise QueueFullError(f"{self.num_waiting:,} requests are waiting, which is the limit: try again later")
        self._lines.setdefault(request.client, deque()).append(request)

    def end(self, request_id: str, finish: Finish) -> Answer | None:
        """End a request early and return its answer; None where there is no such request any more."""
        for line in self._lines.values():
            for request in line:
                if request.id == request_id:
                    self._has_room = True  # another one is the next
                    line.remove(request)
                    return Answer(request_id=request_id, finish=finish)
        work = self._active.get(request_id)
        # What is under way of it comes before all that its rows will be given to (finlora/engine/kv_cache.py).
        return None if work is None else self._finish(work, finish)

    def uses_adapter(self, name: str) -> bool:
        """Return whether a request in line or at work names the adapter."""
        return any(request.adapter == name for request in self._requests())

    def forget_adapter(self, name: str) -> None:
        """Drop the kept prefixes of an adapter, whose name may come to mean another."""
        self.pool.forget(name)

    def expire(self, now: float) -> list[Answer]:
        """End all requests whose deadline has passed."""
        late = [request.id for request in self._requests() if request.deadline is not None and request.deadline < now]
        return [answer for name in late if (answer := self.end(name, "deadline")) is not None]

    def next_batch(self) -> MicroBatch | None:
        """Return the next micro-batch, or None where nothing can be computed now."""
        is_full = len(self._in_flight) >= self.limits.max_in_flight
        followers = self._find_followers()
        if is_full and not followers and not self._may_go_ahead():
            return None
        # With stages free, what waits for nothing comes first: behind the first stage they would wait for the tokens too.
        chosen = self._choose(followers if is_full else {}) or (self._choose(followers) if followers else [])
        if not chosen:
            return None
        # Copies in the order of admission: one may read what the next overwrites.
        batch, self._copies = MicroBatch(self._number, copies=self._copies), []
        if any(work in followers for work, _ in chosen):
            batch.follows = next(iter(self._in_flight))
        # Rows of one adapter lie side by side; the base alone comes first.
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
        """Take back a micro-batch: the new tokens of requests that go on or end, and the answers of those that ended."""
        tokens, log_probs = iter(output.tokens), iter(output.log_probs)
        news: list[tuple[str, Token]] = []
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
            token = Token(*next(tokens))
            if is_over:
                continue
            if token.id == self.end_token_id:
                answers.append(self._finish(work, "end"))
                continue
            work.tokens.append(token)
            news.append((request.id, token))
            if len(work.tokens) >= request.sampling.max_tokens:
                answers.append(self._finish(work, "length"))
        return news, answers

    def _requests(self) -> Iterator[Request]:
        yield from chain.from_iterable(self._lines.values())
        yield from (work.request for work in self._active.values())

    def _finish(self, work: Work, finish: Finish, log_probs: Sequence[float] = ()) -> Answer:
        del self._active[work.request.id]
        if work.is_prefilled and work.tokens:  # the last token was sampled, not computed
            work.extent.ids = (*work.request.prompt_ids, *(token.id for token in work.tokens[:-1]))
            work.extent.num_ready = len(work.extent.ids)
        self.pool.release(work.extent)
        self._has_room = True
        return Answer(
            request_id=work.request.id,
            finish=finish,
            tokens=tuple(work.tokens),
            log_probs=tuple(log_probs),
            num_cached=work.num_cached,
        )

    def _find_followers(self) -> dict[Work, int]:
        """Return whose next token can be begun behind the one that the oldest micro-batch samples, and the places of those."""
        is_open = self.limits.follows and 0 < self.num_in_flight <= self.limits.max_in_flight
        awaits = self._with_prompts or (self._has_room and self.num_waiting)
        if not is_open or awaits or self.num_prefilled < self.num_active:
            return {}
        return {
            work: sample
            for work, _, sample in next(iter(self._in_flight.values()))
            if sample is not None
            and work.in_flight == 1
            and len(work.tokens) + 1 < work.request.sampling.max_tokens
            and self._active.get(work.request.id) is work
        }

    def _choose(self, followers: Container[Work]) -> list[tuple[Work, int]]:
        """Return requests and how many prompt tokens (0: one generated token) of each to compute."""
        chosen, budget = list[tuple[Work, int]](), self.limits.max_batch_tokens
        active = self._active.values()
        ready = [work for work in active if work in followers or (work.is_prefilled and not work.in_flight)]
        # Split evenly over the passes in flight, or the first would take all and leave the other stages nothing.
        share = -(-self.num_prefilled // self.limits.max_in_flight)
        for work in ready[: min(share, budget)]:
            chosen.append((work, 0))
            budget -= 1
            self._active.move_to_end(work.request.id)
        prompts = [work for work in active if not work.is_prefilled]
        whole = budget = self._cut(budget)
        beginnings = Beginnings()
        for work in prompts:
            budget = self._take_prompt(chosen, beginnings, work, budget)
        while budget > 0 and (new := self._admit(beginnings, budget, whole)) is not None:
            budget = self._take_prompt(chosen, beginnings, new, budget)
        return chosen

    def _may_go_ahead(self) -> bool:
        """Return whether a micro-batch may wait before the first stage: where it has many rows, and no next token behind it."""
        is_free = len(self._in_flight) <= self.limits.max_in_flight and not self.is_decoding
        return is_free and self._count_prompt_tokens(MIN_CHUNK, attrgetter("num_computed")) >= MIN_CHUNK

    @property
    def is_decoding(self) -> bool:
        """Whether text is generated."""
        return any(work.is_prefilled and not work.request.choices for work in self._active.values())

    def _cut(self, budget: int) -> int:
        """Return how many prompt tokens to compute now, so that each stage gets a part of what there is."""
        most = self.limits.max_in_flight
        # Of prompts that have begun the whole: their parts stay equal.
        rest = self._count_prompt_tokens(
            budget * (most + 1), attrgetter("num_cached"), 1 - self._cached_share * (most > 1)
        )
        part = max(MIN_CHUNK, -(-rest // most))
        if not self.is_decoding:
            part = min(part, max(MIN_AHEAD_CHUNK, -(-rest // max(1, most + 1 - len(self._in_flight)))))
        return min(budget, part)

    def _count_prompt_tokens(self, enough: int, done: Callable[[Work], int], share: float = 1.0) -> int:
        """Return the tokens of all prompts but those done, and a share of those in line, counting until there are enough."""
        active = self._active.values()
        started = (len(work.request.prompt_ids) - done(work) for work in active if not work.is_prefilled)
        waiting = (math.ceil(share * len(request.prompt_ids)) for line in self._lines.values() for request in line)
        rest = 0
        for length in chain(started, waiting):
            rest += length
            if rest >= enough:
                break
        return rest

    def _take_prompt(self, chosen: list[tuple[Work, int]], beginnings: Beginnings, work: Work, budget: int) -> int:
        """Add as much of a prompt as the budget allows; choices go with its last part, whatever their number."""
        count = min(budget, len(work.request.prompt_ids) - work.num_computed)
        if count > 0:
            chosen.append((work, count))
            beginnings.add(work.request, work.num_computed + count)
        return budget - count

    def _admit(self, beginnings: Beginnings, budget: int, whole: int) -> Work | None:
        """Admit the request whose turn it is; None without one, without room, or where the next micro-batch suits it better."""
        while self._lines and not next(iter(self._lines.values())):
            self._lines.popitem(last=False)
        if not self._lines:
            return None
        client, line = next(iter(self._lines.items()))
        request = line[0]
        source, length = self.pool.find(request.adapter, request.prompt_ids)
        if self.limits.keeps_prefixes and beginnings.has(request, length + MIN_PREFIX):
            return None  # the next micro-batch copies them
        # Cut prompts attend at half the speed, and one stage alone has no others to cut them for.
        if self.limits.max_in_flight == 1 and budget < len(request.prompt_ids) - length <= whole >= 2 * budget:
            return None
        extent = self.pool.allocate(request.adapter, request.prompt_ids, request.num_tokens, source)
        if extent is None and not self._active:  # the prefix itself lies in the way, and nobody's end would make room
            source, length = None, 0
            extent = self.pool.allocate(request.adapter, request.prompt_ids, request.num_tokens, None)
        if extent is None:
            self._has_room = False
            return None
        line.popleft()
        self._lines.move_to_end(client)
        if source is not None:
            self._copies.append((source.start, extent.start, length))
            self.pool.touch(source)
        extent.num_ready = length
        self._cached_share += 0.1 * (length / len(request.prompt_ids) - self._cached_share)
        seed = request.sampling.seed if request.sampling.seed is not None else self._make_seed()
        work = self._active[request.id] = Work(request, extent, seed, length, length)
        return work
