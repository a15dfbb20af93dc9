"""Several answers to a prompt, likeliest tokens, and OpenAI's and vLLM's sampling fields, by OpenAI's own client."""

from __future__ import annotations

import math

import openai
import pytest

PROMPT = "Profit rose 12 %"
RANDOM = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, "temperature": 1.3}


def ask(client, **changes):
    """Return a completion; fields of vLLM go beside OpenAI's."""
    extra = {key: changes.pop(key) for key in ("top_k", "min_p", "min_tokens", "ignore_eos") if key in changes}
    return client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 6} | changes, extra_body=extra)


def test_answers_of_n_are_those_of_the_seeds_one_by_one(client, live):
    together = client.completions.create(**RANDOM, n=3, seed=5, logprobs=0)
    alone = [client.completions.create(**RANDOM, seed=5 + number, logprobs=0) for number in range(3)]
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    assert [choice.text for choice in together.choices] == [reply.choices[0].text for reply in alone]
    assert len({choice.text for choice in together.choices}) == 3
    assert together.usage.prompt_tokens == alone[0].usage.prompt_tokens, "a prompt counts once"
    assert together.usage.completion_tokens == sum(reply.usage.completion_tokens for reply in alone)
    live.wait_until_idle()


def test_prompts_with_n_come_in_their_order(client):
    whole = client.completions.create(**RANDOM | {"prompt": ["The", PROMPT]}, n=2, seed=1)
    alone = [client.completions.create(**RANDOM | {"prompt": text}, n=2, seed=1) for text in ("The", PROMPT)]
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [c.text for c in whole.choices] == [c.text for reply in alone for c in reply.choices]


@pytest.mark.parametrize("prompt", [PROMPT, ["The", PROMPT]])
def test_streamed_answers_equal_the_whole_ones(client, prompt):
    asked = RANDOM | {"prompt": prompt, "n": 2, "seed": 9, "logprobs": 2}
    whole = client.completions.create(**asked)
    texts, reasons, top = {}, {}, {}
    for event in client.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in event.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            reasons[choice.index] = choice.finish_reason
            if choice.logprobs:
                top.setdefault(choice.index, []).extend(choice.logprobs.top_logprobs)
        usage = event.usage
    assert texts == {choice.index: choice.text for choice in whole.choices}
    assert reasons == {choice.index: choice.finish_reason for choice in whole.choices}
    assert top == {choice.index: choice.logprobs.top_logprobs for choice in whole.choices}
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)


def test_streamed_conversations_have_their_own_roles_and_ends(client):
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "The"}],
        "max_tokens": 4,
        "n": 3,
        "temperature": 1,
    }
    choices = [c for event in client.chat.completions.create(**asked, seed=2, stream=True) for c in event.choices]
    assert sorted(c.index for c in choices if c.delta.role) == [0, 1, 2]
    assert sorted(c.index for c in choices if c.finish_reason) == [0, 1, 2]
    whole = client.chat.completions.create(**asked, seed=2)
    for own in whole.choices:
        assert "".join(c.delta.content or "" for c in choices if c.index == own.index) == own.message.content


def test_a_left_stream_of_several_answers_frees_all_cache_rows(client, live):
    with client.completions.create(**RANDOM | {"max_tokens": 200}, n=3, stream=True) as stream:
        next(iter(stream))
    live.wait_until_idle()


def test_likeliest_tokens_begin_with_the_greedy_one_and_hold_the_answers(client):
    (choice,) = ask(client, logprobs=4).choices
    for token, log_prob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert top[token] == pytest.approx(log_prob)
        assert max(top.values()) == pytest.approx(log_prob), "temperature 0 takes the likeliest"
        assert len(top) <= 4
        assert sum(map(math.exp, top.values())) <= 1 + 1e-6
    unlikely = client.completions.create(**RANDOM | {"temperature": 2}, seed=4, logprobs=1).choices[0].logprobs
    assert all(token in top for token, top in zip(unlikely.tokens, unlikely.top_logprobs, strict=True))
    assert ask(client, logprobs=0).choices[0].logprobs.top_logprobs is None


def test_a_conversations_likeliest_tokens(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "The"}], "max_tokens": 3}
    (choice,) = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices
    for token in choice.logprobs.content:
        first, second = token.top_logprobs
        assert (first.token, first.logprob) == (token.token, pytest.approx(token.logprob))
        assert first.logprob >= second.logprob
    (choice,) = client.chat.completions.create(**asked, logprobs=True).choices
    assert [token.top_logprobs for token in choice.logprobs.content] == [[]] * 3


def test_sampling_fields_reach_the_engine(client, live):
    greedy = ask(client).choices[0].text
    assert ask(client, temperature=2.0, top_k=1).choices[0].text == greedy
    assert ask(client, temperature=2.0, min_p=1.0).choices[0].text == greedy
    assert ask(client, temperature=2.0, top_k=-1, seed=3).choices[0].text != greedy
    assert (
        ask(client, presence_penalty=2, frequency_penalty=2, max_tokens=30).choices[0].text
        != ask(client, max_tokens=30).choices[0].text
    )
    end = live.server.base.end_token_id
    ends = ask(client, logit_bias={str(end): 100})
    later = ask(client, logit_bias={str(end): 100}, min_tokens=3)
    never = ask(client, logit_bias={str(end): 100}, ignore_eos=True)
    assert [(r.choices[0].finish_reason, r.usage.completion_tokens) for r in (ends, later, never)] == [
        ("stop", 0),
        ("stop", 3),
        ("length", 6),
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n": 129}, r"n.*less than or equal to 128"),
        (
            {"n": 100, "prompt": ["a"] * 11},
            r"found 11 prompts with n=100: expected at most [\d,]+ answers in one request",
        ),
        ({"presence_penalty": 2.1}, r"presence_penalty.*less than or equal to 2"),
        ({"best_of": 4}, r"best_of differs from n: send n alone"),
        ({"logprobs": 21}, r"logprobs.*less than or equal to 20"),
        ({"logit_bias": {"99999999": 1}}, r"logit_bias names token 99,999,999: expected ids from 0 to"),
        ({"logit_bias": {"the": 1}}, r"logit_bias"),
        ({"logit_bias": {"5": 101}}, r"logit_bias.5.*less than or equal to 100"),
        ({"min_tokens": 7}, r"min_tokens=7: expected 0 to max_tokens=6"),
        ({"min_tokens": 2, "extra": {"guided_choice": ["a"]}}, r"min_tokens and ignore_end do not go with a grammar"),
        ({"top_k": -2}, r"top_k.*greater than or equal to -1"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(client, changes, words):
    extra = changes.pop("extra", {})
    extra |= {key: changes.pop(key) for key in ("top_k", "min_tokens") if key in changes}
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(**{"model": "tiny", "prompt": PROMPT, "max_tokens": 6} | changes, extra_body=extra)


def test_likeliest_tokens_of_a_conversation_need_logprobs(client):
    with pytest.raises(openai.BadRequestError, match="top_logprobs is only allowed with logprobs=true"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "The"}], top_logprobs=2)
