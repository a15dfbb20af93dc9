"""Tool calls read from an answer's text, in pieces of any size."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finlora.serve.conversation import Message
from finlora.serve.http.tool_calls import CallReader, describe_tools, join_deltas
from finlora.serve.structured_fields import Function

ARGUMENTS = '{"text": "1 < 2 }\\n</tool_call>", "n": {"a": 1}}'
CALL = f'<tool_call>\n{{"name": "count", "arguments": {ARGUMENTS}}}\n</tool_call>'
EMPTY = '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'


def read(pieces):
    reader = CallReader()
    found = join_deltas([delta for piece in pieces for delta in reader.push(piece)] + reader.finish())
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in found.get("tool_calls", ())]
    return found["content"], calls


def cut(text, edges):
    edges = [0, *sorted(edges), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("No call: 1 < 2 <tool", "No call: 1 < 2 <tool", []),
        (CALL, None, [("count", ARGUMENTS)]),
        (f"{CALL}\n{EMPTY}", None, [("count", ARGUMENTS), ("stop", "{}")]),
        (f"I count.\n{EMPTY}", "I count.\n", [("stop", "{}")]),
        (CALL[:-30], None, [("count", ARGUMENTS[: len(ARGUMENTS) - 30 + 14])]),  # cut off at max_tokens
        ('<tool_call>\n{"name": "cou', "", []),
        ("", "", []),
    ],
)
def test_text_is_the_same_in_pieces_of_any_size(text, content, calls):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(edges=st.sets(st.integers(0, len(text)), max_size=12))
    def check(edges):
        assert read(cut(text, edges)) == (content, calls)

    check()
    assert read(list(text)) == (content, calls)


def test_arguments_are_streamed_before_the_call_is_complete():
    reader, found = CallReader(), []
    for piece in CALL:
        found += reader.push(piece)
    assert len(found) > 20
    first, *rest = found
    assert first["tool_calls"][0]["index"] == 0
    assert first["tool_calls"][0]["id"].startswith("call_")
    assert first["tool_calls"][0]["function"] == {"name": "count", "arguments": ""}
    assert "".join(delta["tool_calls"][0]["function"]["arguments"] for delta in rest) == ARGUMENTS


def test_tools_are_described_in_the_system_message():
    tool = Function(name="count", description="Counts.", parameters={"type": "object", "properties": {}}, strict=True)
    user = Message(role="user", content="How many?")
    added, asked = describe_tools([tool], [user])
    assert asked == user
    assert added.role == "system"
    (line,) = [line for line in added.content.splitlines() if line.startswith('{"type"')]
    described = json.loads(line)["function"]
    assert described == {"name": "count", "description": "Counts.", "parameters": tool.parameters}
    both, _ = describe_tools([tool], [Message(role="developer", content="Be brief."), user])
    assert both.content == "Be brief.\n\n" + added.content
