"""Chunked prefill: chunks for all stages, micro-batches started ahead, and no chunk without a gain."""

from __future__ import annotations

import itertools
import random
from collections import deque

import pytest
from pretend_model import PretendModel, answer_alone
from test_scheduler import make_request, make_scheduler

from finlora.engine.request import Request, Sampling


def test_prompts_are_ready_ahead_of_the_first_stage():
    scheduler = make_scheduler(cache_rows=16384, max_batch_tokens=8192)
    model = PretendModel(16384)
    choices = ((4, 9), (7,))

    def submit(count, length, **changes):
        for _ in range(count):
            prompt = [rng.randint(1, 38) for _ in range(length)]
            scheduler.submit(make_request(f"r{next(numbers)}", prompt, **changes))

    numbers, rng = itertools.count(), random.Random(1)
    submit(80, 101, choices=choices)
    first, second = scheduler.next_batch(), scheduler.next_batch()
    assert [len(batch.scores) for batch in (first, second)] == [3 * 40, 3 * 40]
    submit(3, 101, choices=choices)
    assert scheduler.next_batch() is None  # one ahead is enough
    scheduler.complete(model.run(first))
    assert scheduler.next_batch() is None  # three prompts are too few for a pass of their own
    submit(3, 101, choices=choices)
    third = scheduler.next_batch()
    assert len(third.scores) == 3 * 6
    for batch in (second, third):
        scheduler.complete(model.run(batch))
    submit(1, 101, max_tokens=9)
    first = scheduler.next_batch()
    submit(64, 101, choices=choices)
    assert scheduler.next_batch() is None  # it would delay the next token
    scheduler.complete(model.run(first))
    assert scheduler.next_batch().samples
    assert scheduler.next_batch() is None


def test_prompts_that_fit_one_pass_are_not_chunked_to_start_one_ahead():
    """Each chunk would read and unpack all weights, which takes longer than the stage would idle."""
    scheduler = make_scheduler(cache_rows=16384, max_batch_tokens=8192)
    for number in range(16):
        scheduler.submit(make_request(f"r{number}", [1 + number] + [2] * 178, max_tokens=32))
    assert scheduler.next_batch().num_rows == 16 * 179


def test_chunks_of_one_prompt_are_in_flight_together_and_sized_for_all_stages():
    prompt = tuple(1 + n % 30 for n in range(4400))
    scheduler = make_scheduler(cache_rows=8192, max_in_flight=4, max_batch_tokens=2048)
    scheduler.submit(Request(id="long", prompt_ids=prompt, sampling=Sampling(max_tokens=1)))
    batches = []
    while (batch := scheduler.next_batch()) is not None:
        batches.append(batch)
    assert [batch.num_rows for batch in batches] == [1100] * 4
    model = PretendModel(scheduler.pool.num_rows)
    answers = []
    while batches:
        _, ended = scheduler.complete(model.run(batches.pop(0)))
        answers += ended
        if (batch := scheduler.next_batch()) is not None:
            batches.append(batch)
    (answer,) = answers
    assert [token.id for token in answer.tokens] == answer_alone(
        Request(id="x", prompt_ids=prompt, sampling=Sampling(max_tokens=1))
    )[0]


def test_one_stage_defers_a_prompt_that_does_not_fit_the_rest_of_a_pass():
    scheduler = make_scheduler(cache_rows=16384, max_batch_tokens=1000, keeps_prefixes=False)
    model, rng = PretendModel(16384), random.Random(2)
    for number, length in enumerate((400, 450, 300, 2300, 900, 300, 900)):
        scheduler.submit(make_request(f"r{number}", [rng.randint(1, 38) for _ in range(length)], choices=((4,),)))
    sizes = []
    while (batch := scheduler.next_batch()) is not None:
        sizes.append([segment.num_rows for segment in batch.segments])
        scheduler.complete(model.run(batch))
    # A prompt is chunked if it fits no pass, or if the pass is less than half full.
    assert sizes == [[400, 450], [300, 700], [1000], [600], [900], [300, 700], [200]]


def test_prefix_cached_prompts_are_split_over_stages_by_their_uncached_tokens():
    scheduler = make_scheduler(cache_rows=2**16, max_in_flight=2)
    model, rng = PretendModel(2**16), random.Random(3)
    instruction = [rng.randint(1, 38) for _ in range(400)]
    sizes = []
    for start in (0, 100):
        for number in range(start, start + 64):
            own = [rng.randint(1, 38) for _ in range(40)]
            scheduler.submit(make_request(f"r{number}", [*instruction, *own], choices=((4,),)))
        sizes.append([])
        in_flight = deque()
        while scheduler.num_waiting or scheduler.num_active:
            while (batch := scheduler.next_batch()) is not None:
                sizes[-1].append(len(batch.scores))
                in_flight.append(batch)
            scheduler.complete(model.run(in_flight.popleft()))
    # About 2,700 tokens of the second 64 prompts are new: half of them, half of the rest, then the rest, not all in one.
    assert sizes[1][:2] == [pytest.approx(32, abs=3), pytest.approx(16, abs=3)]
    assert sum(sizes[1]) == 64


def test_prompts_are_split_over_stages_as_at_first_after_the_prefixes_are_forgotten():
    """Earlier prompts, mostly cached, would make the chunks of later ones smaller."""

    def split(scheduler):
        """Answer prompts with a long common prefix; returns the rows of each micro-batch."""
        rows, in_flight = [], deque()
        for number in range(60):
            scheduler.submit(make_request(f"r{number}", [*range(1, 38)] * 20 + [number % 37 + 1] * 40, choices=((4,),)))
        while (batch := scheduler.next_batch()) is not None or in_flight:
            if batch is not None:
                rows.append(batch.num_rows)
                in_flight.append(batch)
                continue
            scheduler.complete(model.run(in_flight.popleft()))
        return rows

    scheduler, model = make_scheduler(cache_rows=16384, max_batch_tokens=2048, max_in_flight=2), PretendModel(16384)
    first = split(scheduler)
    assert split(scheduler) != first
    scheduler.forget_prefixes()
    assert split(scheduler) == first
