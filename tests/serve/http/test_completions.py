"""OpenAI's own client against a real server: texts, streams, probabilities, refusals."""

from __future__ import annotations

import json
import socket

import openai
import pytest
from wire import send

from finlora.engine.request import Request, Sampling
from finlora.serve.http.completions import encode_plain

PROMPT = "Profit rose 12 %"


def answer_alone(live, prompt, count):
    """Return the engine's own answer as text."""
    import asyncio

    base = live.server.base
    ids = (base.tokenizer.bos_token_id, *encode_plain(prompt, base))
    request = Request(id=f"alone-{prompt}-{count}", prompt_ids=ids, sampling=Sampling(max_tokens=count))
    answer = asyncio.run(live.engine.answer(request))
    return base.tokenizer.decode([token.id for token in answer.tokens], skip_special_tokens=True)


def test_completion_equals_the_engines_answer(client, live):
    reply = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=8, logprobs=0)
    (choice,) = reply.choices
    assert choice.text == answer_alone(live, PROMPT, 8)
    assert choice.finish_reason == "length"
    assert reply.usage.completion_tokens == len(choice.logprobs.tokens) == 8
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + 8
    assert "".join(choice.logprobs.tokens) == choice.text
    assert all(value <= 0 for value in choice.logprobs.token_logprobs)
    assert [choice.text[offset:][:1] for offset in choice.logprobs.text_offset] == [
        t[:1] for t in choice.logprobs.tokens
    ]


def test_several_prompts_are_answered_in_order(client, live):
    prompts = [PROMPT, "Loss", "The"]
    reply = client.completions.create(model="tiny", prompt=prompts, max_tokens=4)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.text for choice in reply.choices] == [answer_alone(live, prompt, 4) for prompt in prompts]


def test_prompt_of_token_ids_is_used_unchanged(client, live):
    base = live.server.base
    ids = [base.tokenizer.bos_token_id, *encode_plain(PROMPT, base)]
    reply = client.completions.create(model="tiny", prompt=ids, max_tokens=8)
    assert reply.choices[0].text == answer_alone(live, PROMPT, 8)
    with pytest.raises(openai.BadRequestError, match=r"prompt holds ids outside 0 to 511"):
        client.completions.create(model="tiny", prompt=[512], max_tokens=8)


def test_chat_of_one_message_equals_the_training_prompt(client, live):
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": PROMPT}], max_completion_tokens=8, logprobs=True
    )
    (choice,) = reply.choices
    assert choice.message.content == answer_alone(live, PROMPT, 8)
    assert bytes(b for token in choice.logprobs.content for b in token.bytes).decode() == choice.message.content


def test_stream_joins_to_the_whole_answer_and_reports_usage(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert (events[-1].choices, events[-1].usage.completion_tokens) == ([], 12)
    assert len({event.id for event in events}) == 1
    assert len(events) > 5, "the stream came in one piece"


@pytest.mark.parametrize("stops", [False, True])
def test_streamed_log_probabilities_equal_the_whole_ones(client, live, stops):
    text = answer_alone(live, "Profit", 12)
    # Words that occur only later in the answer: the small base repeats itself.
    late = (text[at : at + size] for size in range(4, len(text)) for at in range(5, len(text) - size))
    stop = next(words for words in late if text.find(words) >= 5)
    asked = {"model": "tiny", "max_tokens": 12, "stop": [stop] if stops else None}
    whole = client.completions.create(**asked, prompt="Profit", logprobs=0).choices[0]
    events = [e.choices[0] for e in client.completions.create(**asked, prompt="Profit", logprobs=0, stream=True)]
    parts = [event.logprobs for event in events if event.logprobs is not None]
    assert whole.finish_reason == ("stop" if stops else "length")
    for field in ("tokens", "token_logprobs", "text_offset"):
        assert [value for part in parts for value in getattr(part, field)] == getattr(whole.logprobs, field)
    sent = 0
    for event in events:
        sent += len(event.text)
        if event.text:
            assert all(offset < sent for offset in event.logprobs.text_offset)
    assert len(parts) > 1, "the stream came in one piece"

    asked |= {"messages": [{"role": "user", "content": "The"}], "logprobs": True}
    whole = client.chat.completions.create(**asked).choices[0]
    events = [event.choices[0] for event in client.chat.completions.create(**asked, stream=True)]
    content = [token for event in events if event.logprobs for token in event.logprobs.content]
    assert content == whole.logprobs.content
    assert "".join(event.delta.content or "" for event in events) == whole.message.content
    assert events[0].logprobs is None
    assert all(event.logprobs.content for event in events if event.delta.content)


def test_stream_has_no_log_probabilities_by_default(client):
    events = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=3, stream=True)
    assert {event.choices[0].logprobs for event in events} == {None}


def test_stop_text_ends_the_answer_and_is_left_out(client, live):
    text = answer_alone(live, "The", 10)
    stop = text[4:7]
    reply = client.completions.create(model="tiny", prompt="The", max_tokens=10, stop=[stop, "§§"], logprobs=0)
    (choice,) = reply.choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    assert "".join(choice.logprobs.tokens).startswith(choice.text)


def test_equal_seeds_sample_equal_texts(client):
    def sample(seed):
        asked = {"model": "tiny", "prompt": PROMPT, "max_tokens": 16, "temperature": 1.5, "top_p": 0.9}
        return client.completions.create(**asked, seed=seed).choices[0].text

    assert sample(3) == sample(3)
    assert len({sample(seed) for seed in range(6)}) > 1


def test_models_are_limited_to_those_of_the_key(client, live):
    assert [model.id for model in client.models.list()] == ["tiny", "tiny:chatty", "tiny:good", "tiny:plain"]
    assert client.models.retrieve("tiny:good").id == "tiny:good"
    narrow = client.with_options(api_key=live.keys["narrow"])
    assert [model.id for model in narrow.models.list()] == ["tiny:good"]
    with pytest.raises(openai.NotFoundError, match=r"no model 'tiny' for key 'narrow': expected one of tiny:good"):
        narrow.completions.create(model="tiny", prompt=PROMPT)


def test_adapters_and_their_versions_answer_differently(client):
    models = ("tiny", "tiny:good", "tiny:good@v1", "tiny:good@v2", "tiny:plain")
    texts = {m: client.completions.create(model=m, prompt=PROMPT, max_tokens=8).choices[0].text for m in models}
    assert texts["tiny:good"] == texts["tiny:good@v2"]
    assert len(set(texts.values())) == 4


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        (
            {"model": "other"},
            openai.NotFoundError,
            r"no model 'other' for key 'desk': expected one of tiny, tiny:chatty",
        ),
        ({"model": "tiny:half"}, openai.NotFoundError, r"no model 'tiny:half'"),
        ({"model": "tiny:../good"}, openai.NotFoundError, r"no model"),
        ({"model": "tiny:good@v9"}, openai.UnprocessableEntityError, r"no version 'v9': expected one of v1, v2"),
        ({"model": "tiny:chatty"}, openai.UnprocessableEntityError, r"template is raw, trained with chat"),
        ({"max_tokens": 5000}, openai.BadRequestError, r"writes at most 2,048 tokens"),
        (
            {"max_tokens": 2000},
            openai.BadRequestError,
            r"This model's maximum context length is 1024 tokens. .*lower max_tokens",
        ),
        (
            {"prompt": "rate " * 3000, "max_tokens": 1},
            openai.BadRequestError,
            r"you requested \d+ tokens \(\d+ in the prompt, 1 in",
        ),
        ({"temperature": -1}, openai.BadRequestError, r"'temperature': .*greater than or equal to 0"),
        ({"stop": ""}, openai.BadRequestError, r"stop is empty"),
    ],
)
def test_impossible_request_is_refused_with_a_message(client, changes, kind, words):
    with pytest.raises(kind, match=words):
        client.completions.create(**{"model": "tiny", "prompt": PROMPT} | changes)


def test_conversation_needs_a_base_with_turns(client):
    turns = [{"role": "user", "content": "Hi"}, {"role": "user", "content": PROMPT}]
    with pytest.raises(openai.BadRequestError, match=r"messages hold 2 turns \(user, user\).*send one user message"):
        client.chat.completions.create(model="tiny", messages=turns)


def test_closed_stream_frees_its_cache_rows(client, live):
    with client.completions.create(model="tiny", prompt=PROMPT, max_tokens=900, stream=True) as stream:
        next(iter(stream))
        live.wait_for(lambda: live.engine.snapshot.kv_used > 900)
    live.wait_until_idle()
    assert live.meter.answers[-1][:2] == ("base", "cancelled")


def test_cut_connection_frees_its_cache_rows(live):
    host, port = live.address.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": PROMPT, "max_tokens": 900, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {live.keys['desk']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as line:
        line.sendall(head.encode() + body)
        assert b"200 OK" in line.recv(200)
    live.wait_until_idle()


def test_sixty_four_concurrent_clients_get_their_own_answers(live):
    from concurrent.futures import ThreadPoolExecutor

    prompts = [f"Profit rose {number} %" for number in range(64)]
    expected = {prompt: answer_alone(live, prompt, 4) for prompt in prompts}

    def ask(prompt):
        reply = send(
            live.address, "/v1/completions", live.keys["desk"], {"model": "tiny", "prompt": prompt, "max_tokens": 4}
        )
        return prompt, reply.body["choices"][0]["text"]

    with ThreadPoolExecutor(64) as pool:
        assert dict(pool.map(ask, prompts)) == expected
