"""Messages of a conversation as clients send them, the server's own answers among them, and their texts in the prompt.

Tool calls and their results are written as Hermes and Qwen write them.
Source: https://platform.openai.com/docs/api-reference/chat/create and the chat template of
https://huggingface.co/Qwen/Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from finlora.grammar.compile import CALL_END, CALL_NAMED, CALL_START
from finlora.serve.wire_object import WireObject

_IGNORED = ("annotations", "reasoning", "reasoning_content", "provider_specific_fields", "audio", "function_call")
"""Fields of an answer that clients send back; they are no part of a prompt."""


class TextPart(WireObject):
    type: Literal["text", "refusal"] = Field(description="Only texts.")
    text: str = Field("", description="Part of the message.")
    refusal: str = Field("", description="The same, with the type `refusal`.")

    @model_validator(mode="before")
    @classmethod
    def _check_kind(cls, values: Any) -> Any:
        kind = values.get("type") if isinstance(values, dict) else None
        if isinstance(kind, str) and kind not in ("text", "refusal"):
            raise PydanticCustomError(
                "part",
                "a message holds a part of type {kind}: this model reads texts only, so send parts of type text.",
                {"kind": kind[:40], "param": "messages"},
            )
        return values


class SentFunction(WireObject):
    name: str = Field(description="Function that was called.")
    arguments: str = Field(description="JSON of its arguments.")


class SentCall(WireObject):
    id: str | None = Field(None, description="Id of the call.")
    type: Literal["function"] = Field("function", description="Always `function`.")
    index: int | None = Field(None, description="Ignored.")
    function: SentFunction = Field(description="What was called.")


class Message(WireObject):
    role: Literal["system", "developer", "user", "assistant", "tool"] = Field(description="Who speaks.")
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = Field(
        None, description="What is said. null only in an answer of the assistant."
    )
    name: str | None = Field(None, description="Ignored.")
    refusal: str | None = Field(None, description="Of an answer sent back. A text stands for `content`.")
    tool_calls: Annotated[list[SentCall], Field(fail_fast=True)] | None = Field(
        None, description="Of an answer sent back: the calls that it made."
    )
    tool_call_id: str | None = Field(None, description="With the role `tool`: the call that this is the result of.")

    @model_validator(mode="before")
    @classmethod
    def _drop_ignored(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        is_answer = values.get("role") == "assistant"
        return {key: value for key, value in values.items() if key not in _IGNORED or (value and not is_answer)}

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if self.role != "assistant":
            if self.content is None or self.content == []:
                raise ValueError(f"a message of role {self.role} has no content: expected a text")
            if self.tool_calls:
                raise ValueError(f"a message of role {self.role} holds tool_calls: only the assistant calls tools")
        return self

    @property
    def text(self) -> str:
        """Text of the message in a prompt, its tool calls included."""
        if self.content is None:
            said = self.refusal or ""
        elif isinstance(self.content, str):
            said = self.content
        else:
            said = "".join(part.text or part.refusal for part in self.content)
        return "\n".join([*([said] if said or not self.tool_calls else []), *map(_show_call, self.tool_calls or ())])


def list_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return pairs of role and text, in the roles of a chat template: results of tools are in a turn of the user."""
    turns: list[tuple[str, str]] = []
    is_result = False
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        text = message.text
        if role == "tool":
            text = f"<tool_response>\n{text}\n</tool_response>"
            if is_result:  # results of several calls stand in one turn
                turns[-1] = ("user", f"{turns[-1][1]}\n{text}")
                continue
        turns.append(("user" if role == "tool" else role, text))
        is_result = role == "tool"
    return turns


def join_raw(turns: Sequence[tuple[str, str]]) -> str | None:
    """Return the prompt of a base without turns: the user's text, after the texts of the system, a blank line between.

    None: the turns are others.
    """
    roles = [role for role, _ in turns]
    if roles.count("user") != 1 or roles[-1] != "user" or set(roles) - {"system", "user"}:
        return None
    return "\n\n".join(text for _, text in turns if text)


def _show_call(call: SentCall) -> str:
    try:
        arguments: Any = json.loads(call.function.arguments)
    except (json.JSONDecodeError, RecursionError):
        arguments = call.function.arguments  # of an answer that was cut off
    name = json.dumps(call.function.name, ensure_ascii=False)[1:-1]
    return f"{CALL_START}{name}{CALL_NAMED}{json.dumps(arguments, ensure_ascii=False)}{CALL_END}"
