"""Scheduler under random traffic: each request answered once, no cache row leaked, every row attends to the right keys."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
from pretend_model import END, PretendModel, answer_alone

from finlora.engine.admission import Limits
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.errors import ConfigError, QueueFullError


def make_scheduler(**limits):
    return Scheduler(Limits(**{"cache_rows": 256} | limits), END, lambda: 7)


def make_request(name, prompt=(1, 2, 3), max_tokens=4, **changes):
    return Request(id=name, prompt_ids=tuple(prompt), sampling=Sampling(max_tokens=max_tokens), **changes)


def run_all(scheduler, model=None, batches=()):
    """Compute until no request is left, starting with the batches in flight; returns the answers by request."""
    model = model or PretendModel(scheduler.pool.num_rows)
    in_flight, answers = deque(batches), {}
    while True:
        while (batch := scheduler.next_batch()) is not None:
            in_flight.append(batch)
        if not in_flight:
            return answers
        for answer in scheduler.complete(model.run(in_flight.popleft()))[1]:
            assert answer.request_id not in answers
            answers[answer.request_id] = answer


def random_request(rng, number, most_tokens):
    """Prompts of a few families with common prefixes; some with choices, some generate."""
    family = rng.choice([(1,) * 30, (2,) * 50, tuple(range(3, 33)), ()])
    prompt = (*family[: rng.randint(0, 60)], *(rng.randint(1, 39) for _ in range(rng.randint(1, 40))))
    choices = ()
    if rng.random() < 0.4:
        choices = tuple(tuple(rng.randint(1, 39) for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 4)))
    return make_request(
        f"r{number}",
        prompt,
        rng.randint(1, most_tokens),
        choices=choices,
        adapter=rng.choice([None, None, "a", "b"]),
        client=rng.choice(["x", "y", "z"]),
    )


@pytest.mark.parametrize("follows", [False, True], ids=["not following", "following"])
@pytest.mark.parametrize("seed", range(40))
def test_random_traffic_is_answered_once_and_as_alone(seed, follows):
    rng = random.Random(seed)
    scheduler = make_scheduler(
        cache_rows=rng.choice([160, 320, 2048]),
        max_batch_tokens=rng.choice([1, 7, 64, 4096]),
        max_in_flight=rng.choice([1, 2, 4]),
        keeps_prefixes=rng.random() < 0.8,
        follows=follows,
    )
    model = PretendModel(scheduler.pool.num_rows)
    # To be followed, requests come in bursts and are long: nothing follows while prompts wait.
    requests = [random_request(rng, number, 40 if follows else 12) for number in range(60)]
    requests = {request.id: request for request in requests}
    to_come, in_flight = deque(requests.values()), deque()
    answers, counted, new = {}, Counter(), {name: [] for name in requests}
    cancelled = set()
    while to_come or in_flight or scheduler.num_active or scheduler.num_waiting:
        for _ in range(rng.randint(0, 3) if not follows or rng.random() < 0.1 else 0):
            if to_come:
                scheduler.submit(to_come.popleft())
        done = []
        if rng.random() < 0.1 and (open_ones := sorted(requests.keys() - answers.keys() - cancelled)):
            name = rng.choice(open_ones)
            if requests[name] not in to_come:
                cancelled.add(name)
                done.append(scheduler.end(name, "cancelled"))
        was_decoding = scheduler.is_decoding
        if rng.random() < 0.7 and (batch := scheduler.next_batch()) is not None:
            assert batch.num_rows > 0
            if (num_ahead := len(in_flight) - scheduler.limits.max_in_flight + 1) > 0:
                assert num_ahead == 1
                # A request that generates text goes on with its next token.
                assert not was_decoding or (follows and batch.samples)
            in_flight.append(batch)
        assert len(in_flight) == scheduler.num_in_flight
        if in_flight and rng.random() < 0.6:
            tokens, ended = scheduler.complete(model.run(in_flight.popleft()))
            done += ended
            for name, token in tokens:
                new[name].append(token.id)
        for answer in done:
            answers[answer.request_id] = answer
            counted[answer.request_id] += 1
        pool = scheduler.pool
        assert pool.num_held + pool.num_kept + pool.num_free == pool.num_rows
    assert set(counted) == set(requests)
    assert set(counted.values()) == {1}
    assert scheduler.pool.num_held == 0
    for name, answer in answers.items():
        tokens, sums = answer_alone(requests[name])
        own = [token.id for token in answer.tokens]
        assert own == new[name]
        if answer.finish == "cancelled":
            assert name in cancelled
            assert own == tokens[: len(own)]
        else:
            assert own == tokens
            assert list(answer.log_probs) == sums


def test_shared_prefix_is_computed_once():
    scheduler = make_scheduler(cache_rows=2048)
    prompts = [(*range(1, 61), *(30, 20, 10 + n)) for n in range(8)]
    for number, prompt in enumerate(prompts):
        scheduler.submit(make_request(f"r{number}", prompt, 1))
    batches, model = [], PretendModel(2048)
    while (batch := scheduler.next_batch()) is not None:
        batches.append(batch)
        scheduler.complete(model.run(batch))
    assert [batch.num_rows for batch in batches] == [63, 7]  # the others differ only in their last token
    assert len(batches[1].copies) == 7
    scheduler.submit(make_request("again", prompts[3], 1))
    assert scheduler.next_batch().num_rows == 1


def test_prefix_cache_that_is_off_computes_every_row():
    scheduler = make_scheduler(cache_rows=2048, keeps_prefixes=False)
    for number in range(4):
        scheduler.submit(make_request(f"r{number}", range(1, 41), 1))
    batch = scheduler.next_batch()
    assert (batch.num_rows, batch.copies) == (160, [])
    scheduler.complete(PretendModel(2048).run(batch))
    assert scheduler.pool.num_free == 2048


def test_adapters_do_not_share_prefixes():
    scheduler, model = make_scheduler(cache_rows=2048), PretendModel(2048)
    answers = {}
    for name, adapter in (("one", None), ("two", "a"), ("three", "a")):
        scheduler.submit(make_request(name, range(1, 41), 1, adapter=adapter))
        answers |= run_all(scheduler, model)
    assert [answers[name].num_cached for name in ("one", "two", "three")] == [0, 0, 39]


def test_least_recently_used_prefixes_are_dropped_first():
    scheduler, model = make_scheduler(cache_rows=160), PretendModel(160)
    for number in range(3):
        scheduler.submit(make_request(f"r{number}", [number + 1] * 40, 8))
        run_all(scheduler, model)
    scheduler.submit(make_request("hit", [3] * 40, 8))
    assert run_all(scheduler, model)["hit"].num_cached == 39
    scheduler.submit(make_request("gone", [1] * 40, 8))
    assert run_all(scheduler, model)["gone"].num_cached == 0


def test_decoding_is_split_over_the_passes_in_flight():
    scheduler = make_scheduler(cache_rows=2048, max_in_flight=4)
    model = PretendModel(2048)
    for number in range(8):
        scheduler.submit(make_request(f"r{number}", [number + 1, 5, 9], 30))
    scheduler.complete(model.run(scheduler.next_batch()))
    batches = [batch for _ in range(5) if (batch := scheduler.next_batch()) is not None]
    assert len(batches) == 4
    assert max(batch.num_rows for batch in batches) <= 2


def test_long_prompt_is_chunked_and_does_not_block_decoding():
    scheduler = make_scheduler(cache_rows=2048, max_batch_tokens=32)
    model = PretendModel(2048)
    scheduler.submit(make_request("short", [4, 4], 40))
    scheduler.complete(model.run(scheduler.next_batch()))
    scheduler.submit(make_request("long", [n % 30 + 1 for n in range(100)], 2))
    sizes, sampled = [], []
    for _ in range(4):
        batch = scheduler.next_batch()
        sizes.append(batch.num_rows)
        sampled.append(len(batch.samples))
        scheduler.complete(model.run(batch))
    assert sizes == [32, 32, 32, 8]
    assert sampled == [1, 1, 1, 2]


def test_clients_take_turns():
    scheduler = make_scheduler(cache_rows=2048, max_batch_tokens=3, keeps_prefixes=False)
    for number in range(3):
        scheduler.submit(make_request(f"many{number}", [1, 2, 3], 1, client="busy"))
    scheduler.submit(make_request("lone", [1, 2, 3], 1, client="other"))
    order = list(run_all(scheduler))
    assert order == ["many0", "lone", "many1", "many2"]


def test_deadline_ends_waiting_and_active_requests():
    scheduler = make_scheduler(cache_rows=64, max_batch_tokens=2)
    model = PretendModel(64)
    scheduler.submit(make_request("active", [1, 2], 30, deadline=5.0))
    scheduler.submit(make_request("waiting", [1, 2], 30, deadline=6.0))
    scheduler.submit(make_request("patient", [1, 2], 3))
    batch = scheduler.next_batch()
    ended = [(answer.request_id, answer.finish) for answer in scheduler.expire(7.0)]
    assert ended == [("waiting", "deadline"), ("active", "deadline")]
    assert scheduler.complete(model.run(batch)) == ([], [])  # its rows in flight are discarded
    assert run_all(scheduler, model).keys() == {"patient"}


def test_impossible_requests_and_limits_are_refused():
    scheduler = make_scheduler(cache_rows=64, max_waiting=1)
    with pytest.raises(ConfigError, match=r"r can need 101 tokens of cache, which has 64: shorten the prompt"):
        scheduler.submit(make_request("r", [1], 100))
    with pytest.raises(ConfigError, match=r"expected at least one token in its prompt"):
        scheduler.submit(make_request("r", []))
    scheduler.submit(make_request("r"))
    with pytest.raises(ConfigError, match=r"a request with this id is waiting or active"):
        scheduler.submit(make_request("r"))
    with pytest.raises(QueueFullError, match=r"1 requests are waiting, which is the limit: try again later"):
        scheduler.submit(make_request("s"))
    with pytest.raises(ConfigError, match=r"cache_rows=1: expected at least 16(.|\n)*max_in_flight=0"):
        Limits(cache_rows=1, max_in_flight=0)


def test_prompt_that_is_cancelled_ends_though_its_chunks_are_in_flight():
    scheduler = make_scheduler(cache_rows=8192, max_in_flight=3, max_batch_tokens=1024)
    scheduler.submit(Request(id="long", prompt_ids=(5,) * 4000))
    model = PretendModel(scheduler.pool.num_rows)
    batches = [scheduler.next_batch() for _ in range(3)]
    assert scheduler.end("long", "cancelled").finish == "cancelled"
    assert scheduler.end("long", "cancelled") is None
    assert scheduler.next_batch() is None
    assert scheduler.pool.num_held == 0
    assert [scheduler.complete(model.run(batch)) for batch in batches] == [([], [])] * 3
