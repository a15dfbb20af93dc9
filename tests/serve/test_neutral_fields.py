"""Fields that ask for nothing, and answers sent back as history."""

from __future__ import annotations

import pytest
from wire import send

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "Profit rose 12 %"}], "max_tokens": 4}
NEUTRAL = {
    "stream": None,
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "logit_bias": {},
    "store": False,
    "metadata": {"desk": "rates"},
    "service_tier": "auto",
    "parallel_tool_calls": True,
    "top_k": -1,
    "repetition_penalty": 1.0,
    "ignore_eos": False,
    "safety_identifier": "someone",
    "modalities": ["text"],
    "logprobs": None,
    "temperature": None,
}


def test_neutral_values_are_absent(live):
    plain = send(live.address, "/v1/chat/completions", live.keys["desk"], ASK)
    full = send(live.address, "/v1/chat/completions", live.keys["desk"], ASK | NEUTRAL)
    assert plain.body["choices"] == full.body["choices"]
    text = {"model": "tiny", "prompt": "Profit", "max_tokens": 2, "suffix": "", "echo": False, "best_of": 1}
    reply = send(live.address, "/v1/completions", live.keys["desk"], text | NEUTRAL)
    assert (reply.status, reply.text if reply.status != 200 else "") == (200, "")


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"store": True}, "store", "store is not offered with this value: this server stores no answers"),
        ({"repetition_penalty": 1.2}, "repetition_penalty", "repetition_penalty is not offered with this value"),
        ({"repetition_penalty": True}, "repetition_penalty", "repetition_penalty is not offered with this value"),
        ({"service_tier": "priority"}, "service_tier", "this server has one tier: leave it out."),
        ({"nonsense": 1}, "nonsense", "Unknown parameter: 'nonsense'."),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages",
            "a message holds a part of type image_url: this model reads texts only",
        ),
    ],
)
def test_wish_that_cannot_be_met_is_refused_in_one_sentence(live, changes, param, words):
    reply = send(live.address, "/v1/chat/completions", live.keys["desk"], ASK | changes)
    assert (reply.status, reply.error["param"]) == (400, param)
    assert words in reply.error["message"]
    assert "; " not in reply.error["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"refusal": None, "tool_calls": [], "annotations": [], "audio": None, "function_call": None},
        {"reasoning_content": None, "provider_specific_fields": {"refusal": None}},
    ],
)
@pytest.mark.parametrize("content", [None, "", [], "Yes", [{"type": "text", "text": "Yes"}]])
def test_answers_sent_back_are_taken(live, content, more):
    """The base of the tests has no turns: what is refused is the conversation, not the form of its messages."""
    history = [*ASK["messages"], {"role": "assistant", "content": content} | more, *ASK["messages"]]
    reply = send(live.address, "/v1/chat/completions", live.keys["desk"], ASK | {"messages": history})
    assert reply.error["message"].startswith("messages hold 3 turns (user, assistant, user)")


def test_message_without_content_is_refused(live):
    reply = send(live.address, "/v1/chat/completions", live.keys["desk"], ASK | {"messages": [{"role": "user"}]})
    assert "a message of role user has no content" in reply.error["message"]
