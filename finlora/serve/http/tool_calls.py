"""Tool calls of an answer: their description in the prompt, and the answer's text as OpenAI's tool_calls, whole or streamed.

One form for all bases, that of Hermes, Qwen and SmolLM3; the grammar makes it certain (finlora/grammar/compile.py).
Source of the description: the chat template of https://huggingface.co/Qwen/Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Sequence
from typing import Any

from finlora.grammar.compile import CALL_END, CALL_MARK, CALL_NAMED, CALL_START
from finlora.serve.conversation import Message
from finlora.serve.structured_fields import Function

_BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_AFTER = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""


def describe_tools(tools: Sequence[Function], messages: Sequence[Message]) -> list[Message]:
    """Return a conversation whose system message describes tools; one is added where there is none."""
    lines = [
        json.dumps(
            {"type": "function", "function": tool.model_dump(exclude_none=True, exclude={"strict"})}, ensure_ascii=False
        )
        for tool in tools
    ]
    text = _BEFORE + "\n".join(lines) + _AFTER
    first, *rest = messages
    if first.role in ("system", "developer"):
        return [_system(f"{first.text}\n\n{text}"), *rest]
    return [_system(text), *messages]


def _system(text: str) -> Message:
    return Message.model_validate({"role": "system", "content": text})


class CallReader:
    """Reader of an answer's text in pieces; returns OpenAI's deltas."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._text, self._is_in_call, self._has_name = "", False, False

    def push(self, text: str) -> list[dict[str, Any]]:
        """Add text and return the deltas that are certain now."""
        self._text += text
        deltas: list[dict[str, Any]] = []
        while True:
            if not self._is_in_call:
                before, mark, rest = self._text.partition(CALL_MARK)
                if not mark:
                    self._release(deltas, CALL_MARK)
                    return deltas
                if before and (not self.num_calls or before.strip()):
                    deltas.append({"content": before})
                self._text, self._is_in_call, self._has_name = rest, True, False
            elif not self._has_name:
                head, mark, rest = self._text.partition(CALL_NAMED)
                if not mark:
                    return deltas
                function = {"name": head.removeprefix(CALL_START.removeprefix(CALL_MARK)), "arguments": ""}
                call = {"index": self.num_calls, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
                deltas.append({"tool_calls": [call | {"function": function}]})
                self._text, self._has_name, self.num_calls = rest, True, self.num_calls + 1
            else:
                arguments, mark, rest = self._text.partition(CALL_END)
                if not mark:
                    self._release(deltas, CALL_END)
                    return deltas
                self._add_text(deltas, arguments)
                self._text, self._is_in_call = rest, False

    def finish(self) -> list[dict[str, Any]]:
        """Return the deltas of the rest, which is half a call where the answer was cut off."""
        deltas: list[dict[str, Any]] = []
        if not self._is_in_call or self._has_name:
            self._add_text(deltas, self._text)
        self._text = ""
        return deltas

    def _release(self, deltas: list[dict[str, Any]], mark: str) -> None:
        """Add the text that cannot be the start of `mark`."""
        keep = next((n for n in range(min(len(self._text), len(mark) - 1), 0, -1) if self._text.endswith(mark[:n])), 0)
        if not self._is_in_call and self.num_calls and not self._text.strip():
            return  # the line break between two calls
        free, self._text = self._text[: len(self._text) - keep], self._text[len(self._text) - keep :]
        self._add_text(deltas, free)

    def _add_text(self, deltas: list[dict[str, Any]], text: str) -> None:
        if self._is_in_call and text:
            deltas.append({"tool_calls": [{"index": self.num_calls - 1, "function": {"arguments": text}}]})
        elif text and (not self.num_calls or text.strip()):
            deltas.append({"content": text})


def join_deltas(deltas: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return `content` and, where there are calls, `tool_calls` of a whole message."""
    texts: list[str] = []
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        texts.append(delta.get("content", ""))
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls.append({key: value for key, value in part.items() if key != "index"})
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    text = "".join(texts)
    return {"content": text, **({"content": text or None, "tool_calls": calls} if calls else {})}
