"""Micro-batches that follow one in flight, before its tokens are sampled: which requests, and when there are none."""

from __future__ import annotations

from pretend_model import PretendModel, answer_alone
from test_scheduler import make_request, make_scheduler, run_all


def test_next_token_follows_one_that_is_not_known_yet():
    scheduler, model = make_scheduler(cache_rows=2048, follows=True), PretendModel(2048)
    request = make_request("r", [4, 9], 5)
    scheduler.submit(request)
    prompt = scheduler.next_batch()
    assert scheduler.next_batch() is None  # nothing follows a prompt: other prompts may come meanwhile
    scheduler.complete(model.run(prompt))
    batches = [scheduler.next_batch(), scheduler.next_batch()]
    assert scheduler.next_batch() is None  # one waits; nothing follows what waits
    assert [batch.follows for batch in batches] == [None, 1]
    assert (batches[1].input_ids, batches[1].positions) == ([-1], [3])
    answers = []
    while batches:
        answers += scheduler.complete(model.run(batches.pop(0)))[1]
        batches += [batch] if (batch := scheduler.next_batch()) else []
    assert [token.id for token in answers[0].tokens] == answer_alone(request)[0]
    assert scheduler.num_in_flight == 0  # no speculative row, since max_tokens was known to be reached


def prefill(scheduler, model, *requests):
    """Compute the prompts of requests."""
    for request in requests:
        scheduler.submit(request)
    while scheduler.num_prefilled < len(requests):
        scheduler.complete(model.run(scheduler.next_batch()))


def test_speculative_row_behind_an_end_token_is_discarded():
    scheduler, model = make_scheduler(cache_rows=2048, follows=True), PretendModel(2048)
    prompt = next((n, 7) for n in range(1, 99) if len(answer_alone(make_request("r", (n, 7), 30))[0]) == 3)
    prefill(scheduler, model, make_request("r", prompt, 30))
    batches, ended = [scheduler.next_batch(), scheduler.next_batch()], []
    while not ended:
        ended = scheduler.complete(model.run(batches.pop(0)))[1]
        if not ended:
            batches.append(scheduler.next_batch())
    assert (ended[0].finish, len(ended[0].tokens), scheduler.num_in_flight) == ("end", 3, 1)
    assert scheduler.pool.num_held == 0
    again = make_request("r", (*prompt, *(token.id for token in ended[0].tokens), 3), 2)  # its id is free
    scheduler.submit(again)
    assert scheduler.complete(model.run(batches.pop(0))) == ([], [])
    answer = run_all(scheduler, model, batches)["r"]
    assert [token.id for token in answer.tokens] == answer_alone(again)[0]
    assert answer.num_cached == len(prompt) + 2  # the speculative row is not part of the kept prefix


def test_followers_are_split_over_the_stages_and_give_way_to_prompts():
    scheduler, model = make_scheduler(cache_rows=2048, max_in_flight=2, follows=True), PretendModel(2048)
    prefill(scheduler, model, *(make_request(name, prompt, 30) for name, prompt in (("a", [4, 9]), ("b", [5, 9]))))
    batches = [scheduler.next_batch() for _ in range(4)]
    assert [batch and batch.follows for batch in batches] == [None, None, 1, None]
    assert [len(batch.samples) for batch in batches[:3]] == [1, 1, 1]
    scheduler.submit(make_request("c", [6, 9], 30))
    scheduler.complete(model.run(batches[0]))
    assert scheduler.next_batch() is None  # one more would delay the prompt when a stage becomes free
    scheduler.complete(model.run(batches[1]))
    mixed = scheduler.next_batch()
    assert (mixed.follows, len(mixed.samples), mixed.num_rows) == (None, 2, 3)
    scheduler.complete(model.run(batches[2]))
    assert scheduler.next_batch().follows is None
    assert scheduler.next_batch() is None


def test_prompt_that_does_not_fit_the_cache_does_not_stop_followers():
    scheduler, model = make_scheduler(cache_rows=64, follows=True), PretendModel(64)
    prefill(scheduler, model, make_request("a", [4, 9], 60))
    scheduler.submit(make_request("b", [5, 9], 60))
    batches = [scheduler.next_batch(), scheduler.next_batch()]
    assert [batch.follows for batch in batches] == [None, 1]
    assert scheduler.end("a", "cancelled").finish == "cancelled"
    for batch in batches:
        scheduler.complete(model.run(batch))
    assert scheduler.next_batch().num_rows == 2
