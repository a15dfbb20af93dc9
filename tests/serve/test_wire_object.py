"""Objects with too many fields are refused as a whole, in every part of a body: each fault would be reported otherwise."""

from __future__ import annotations

import pytest
from wire import send

MANY = {f"x{number}": 1 for number in range(65)}
TURN = {"role": "user", "content": "Profit rose"}


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": [TURN | MANY]},
        {"messages": [TURN | {"content": [{"type": "text", "text": "a"} | MANY]}]},
        {"messages": [TURN], "response_format": {"type": "text"} | MANY},
        {"messages": [TURN], "tools": [{"type": "function", "function": {"name": "f"} | MANY}]},
        {"messages": [TURN], "stream_options": MANY},
        {"messages": [TURN]} | MANY,
    ],
)
def test_an_object_with_too_many_fields_is_one_fault(live, changes):
    reply = send(live.address, "/v1/chat/completions", live.keys["desk"], {"model": "tiny"} | changes)
    message = reply.body["error"]["message"]
    assert reply.status == 400
    assert "fields: expected some of" in message
    assert "x64" not in message
