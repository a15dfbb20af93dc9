"""OpenAI's responses by its own client: whole, streamed, structured, with its own output as history."""

from __future__ import annotations

from typing import Literal

import openai
import pytest
from pydantic import BaseModel

TEXT = "Profit rose 12 %"


class Label(BaseModel):
    label: Literal["positive", "negative"]


def test_response_equals_the_chat_answer(client):
    chat = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": TEXT}], max_tokens=8)
    reply = client.responses.create(model="tiny", input=TEXT, max_output_tokens=8, metadata={"desk": "rates"})
    assert reply.output_text == chat.choices[0].message.content
    assert (reply.status, reply.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    assert (reply.store, reply.metadata) == (False, {"desk": "rates"})


def test_stream_joins_to_the_whole_response(client):
    asked = {"model": "tiny", "input": TEXT, "max_output_tokens": 12}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    assert len(deltas) > 3, "the stream came in one piece"
    kinds = [event.type for event in events if event.type != "response.output_text.delta"]
    assert kinds == [
        *("response.created", "response.in_progress"),
        *("response.output_item.added", "response.content_part.added", "response.output_text.done"),
        *("response.content_part.done", "response.output_item.done", "response.incomplete"),
    ]
    assert events[-1].response.output_text == whole.output_text


def test_answer_is_parsed_by_a_schema(client):
    reply = client.responses.parse(model="tiny", input=TEXT, text_format=Label, max_output_tokens=200)
    assert reply.output_parsed.label in ("positive", "negative")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not offered .*send the whole conversation"),
        ({"store": True}, "store is not offered .*this server stores no answers"),
        ({"reasoning": {"effort": "high"}}, "reasoning is not offered .*thinking off"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "a part of type input_image: this model reads texts only",
        ),
        ({"input": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}, "messages hold 2 turns"),
    ],
)
def test_wish_that_cannot_be_met_is_refused(client, changes, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.responses.create(**{"model": "tiny", "input": TEXT} | changes)
