"""Structured output over HTTP by OpenAI's own client: every field that asks for it, streams, tools, cuts and refusals."""

from __future__ import annotations

import json
import re
import threading
from typing import Literal

import openai
import pytest
from live_server import live_server, make_settings
from pydantic import BaseModel, Field
from wire import send

PROMPT = [{"role": "user", "content": "Profit rose 12 %"}]


class News(BaseModel):
    company: str = Field(max_length=6)
    mood: Literal["good", "bad"]
    percent: int = Field(ge=0, le=99)


class Nothing(BaseModel):
    """Takes no arguments."""


NEWS = News.model_json_schema()
TOOLS = [openai.pydantic_function_tool(News), openai.pydantic_function_tool(Nothing, name="nothing")]
LABELS = ["negative", "neutral", "positive"]


@pytest.fixture(scope="module")
def chatty(dated_base, tmp_path_factory):
    """A server whose base has a chat template."""
    folder = tmp_path_factory.mktemp("chatty")
    model = {"base": str(dated_base), "bits": 16, "compute_dtype": "float32", "template": "chat"}
    with live_server(make_settings(dated_base, model=model, audit_dir=str(folder / "audit")), folder) as live:
        yield live


@pytest.fixture
def caller(chatty):
    with openai.OpenAI(base_url=f"{chatty.address}/v1", api_key=chatty.keys["desk"], max_retries=0) as client:
        yield client


def ask(client, **fields):
    return client.chat.completions.create(
        **({"model": "tiny", "messages": PROMPT, "max_tokens": 100} | fields)
    ).choices[0]


def test_parse_returns_the_model(client):
    reply = client.chat.completions.parse(model="tiny", messages=PROMPT, response_format=News, max_tokens=100)
    assert isinstance(reply.choices[0].message.parsed, News)
    assert reply.choices[0].finish_reason == "stop"


def test_stream_is_parsed_too(client):
    with client.chat.completions.stream(model="tiny", messages=PROMPT, response_format=News, max_tokens=100) as stream:
        events = [event for event in stream if event.type == "content.delta"]
    assert isinstance(stream.get_final_completion().choices[0].message.parsed, News)
    assert len(events) > 5


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"json": NEWS}},
        {"structured_outputs": {"json": json.dumps(NEWS)}},
        {"guided_json": NEWS},
        {"response_format": {"type": "json_object", "schema": NEWS}},
        {"guided_json": json.dumps(NEWS)},
    ],
)
def test_vllms_fields_for_a_schema(client, fields):
    News.model_validate_json(ask(client, extra_body=fields).message.content)


@pytest.mark.parametrize("warm", [0.0, 1.5])
@pytest.mark.parametrize("field", ["structured_outputs", "guided_choice"])
def test_choice(client, field, warm):
    fields = {field: {"choice": LABELS} if field == "structured_outputs" else LABELS}
    assert ask(client, extra_body=fields, temperature=warm, seed=1).message.content in LABELS


@pytest.mark.parametrize(
    "fields", [{"structured_outputs": {"regex": r"Q[1-4] \d{4}"}}, {"guided_regex": r"Q[1-4] \d{4}"}]
)
def test_regex_for_chat_and_for_completions(client, fields):
    assert re.fullmatch(r"Q[1-4] [0-9]{4}", ask(client, extra_body=fields).message.content)
    reply = client.completions.create(model="tiny", prompt="Profit", max_tokens=20, extra_body=fields)
    assert re.fullmatch(r"Q[1-4] [0-9]{4}", reply.choices[0].text)


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}]
)
def test_json_object_begins_one(client, fields):
    assert ask(client, extra_body=fields, max_tokens=20).message.content.startswith("{")


def test_requests_with_and_without_a_grammar_share_the_engine(client):
    alone = ask(client, max_tokens=12).message.content
    found = {}

    def run(name, **fields):
        found[name] = ask(client, **fields).message.content

    kinds = {
        "plain": {"max_tokens": 12},
        "json": {"extra_body": {"guided_json": NEWS}},
        "choice": {"extra_body": {"guided_choice": LABELS}},
    }
    names = [f"{kind}-{number}" for kind in kinds for number in range(4)]
    threads = [threading.Thread(target=run, args=(name,), kwargs=kinds[name.partition("-")[0]]) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert found[f"plain-{number}"] == alone
        News.model_validate_json(found[f"json-{number}"])
        assert found[f"choice-{number}"] in LABELS


def test_cut_off_answer_says_length(client):
    choice = ask(client, response_format={"type": "json_object"}, max_tokens=1)
    assert choice.finish_reason == "length"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="tiny", messages=PROMPT, response_format=News, max_tokens=4)


def test_stop_string_ends_a_structured_answer(client):
    choice = ask(client, extra_body={"guided_json": NEWS}, stop=['"mood"'])
    assert choice.finish_reason == "stop"
    assert re.fullmatch(r'\{"company": ".*", ', choice.message.content)


def test_log_probabilities_are_those_before_the_grammar(client):
    choice = ask(client, extra_body={"guided_choice": ["zzz"]}, logprobs=True)
    assert choice.message.content == "zzz"
    assert sum(token.logprob for token in choice.logprobs.content) < -1, "one choice would have the probability 1"


@pytest.mark.parametrize("is_named", [False, True])
def test_tool_call_fits_its_parameters(caller, is_named):
    named = {"type": "function", "function": {"name": "News"}}
    choice = ask(caller, tools=TOOLS[:1], tool_choice=named if is_named else "required", parallel_tool_calls=False)
    (call,) = choice.message.tool_calls
    assert call.function.name == "News"
    News.model_validate_json(call.function.arguments)
    assert choice.message.content is None
    assert choice.finish_reason == ("stop" if is_named else "tool_calls")


def test_tool_call_is_streamed_and_parsed(caller):
    whole = caller.chat.completions.parse(
        model="tiny", messages=PROMPT, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=120
    )
    (call,) = whole.choices[0].message.tool_calls
    asked = {"model": "tiny", "messages": PROMPT, "tools": TOOLS, "tool_choice": "required", "max_tokens": 120}
    with caller.chat.completions.stream(**asked, parallel_tool_calls=False) as stream:
        for _ in stream:
            pass
    (streamed,) = stream.get_final_completion().choices[0].message.tool_calls
    assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
    assert stream.get_final_completion().choices[0].finish_reason == "tool_calls"


def test_model_may_call_a_tool_or_answer_in_text(caller):
    choice = ask(caller, tools=TOOLS, max_tokens=12)
    assert choice.finish_reason == "length"
    assert choice.message.content
    assert not choice.message.tool_calls


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_response_format_beside_tools_is_the_form_of_an_answer_that_calls_nothing(caller, choice):
    reply = caller.chat.completions.parse(
        model="tiny", messages=PROMPT, tools=TOOLS, tool_choice=choice, response_format=News, max_tokens=200
    )
    (message,) = (choice.message for choice in reply.choices)
    assert bool(message.tool_calls) != isinstance(message.parsed, News)
    assert message.tool_calls or choice == "auto"


def test_tools_that_may_not_be_called_change_nothing(caller):
    plain = ask(caller, max_tokens=8).message.content
    assert ask(caller, max_tokens=8, tools=TOOLS, tool_choice="none").message.content == plain
    assert ask(caller, max_tokens=8, tools=[]).message.content == plain


def wish(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (wish({"type": "array", "uniqueItems": True}), "response_format", "not supported: uniqueItems"),
        ({"guided_json": "{"}, "guided_json", "the text is not JSON"),
        ({"guided_json": "[]"}, "guided_json", "expected a JSON Schema"),
        ({"guided_regex": "("}, "guided_regex", "cannot be read (unclosed group)"),
        ({"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs", "look-around"),
        (
            {"structured_outputs": {"grammar": "root ::= x"}},
            "structured_outputs",
            "grammar is not offered: expected json",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one of json, regex"),
        ({"response_format": {"type": "text", "schema": NEWS}}, "response_format", "belongs to the type json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "expected json_schema with"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex", "expected one of them"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, None, "two functions of one name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}}, None, "names 'no'"),
        ({"tool_choice": "required"}, None, "tools is empty"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"if": {}, "type": "object"}}}]},
            "tools",
            "not supported: if",
        ),
    ],
)
def test_what_cannot_be_followed_is_refused_at_the_door(chatty, fields, param, words):
    body = {"model": "tiny", "messages": PROMPT} | fields
    reply = send(chatty.address, "/v1/chat/completions", chatty.keys["desk"], body)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert words in reply.error["message"]
    assert param is None or reply.error["param"] == param


def test_grammar_that_grows_too_large_ends_with_a_message(live):
    """The first tokens of this one look harmless to the door."""
    body = {"model": "tiny", "messages": PROMPT, "max_tokens": 60, "guided_regex": "(b|c){20}(a{1000}){1000}"}
    reply = send(live.address, "/v1/chat/completions", live.keys["desk"], body)
    assert reply.status == 400
    assert reply.error["code"] == "grammar_too_complex"
    assert "too complex while the answer was written" in reply.error["message"]
    live.wait_until_idle()
