"""Body of `/v1/responses` and its reply, and the chat request that it stands for.

Source: https://platform.openai.com/docs/api-reference/responses/create.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from finlora.serve.neutral_fields import NeutralFields

_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_Items = Annotated[list[dict[str, Any]], Field(fail_fast=True, min_length=1)]
_STATELESS = "this server keeps no answers: send the whole conversation as `input`"
_REFUSED = {
    "previous_response_id": _STATELESS,
    "conversation": _STATELESS,
    "prompt": "stored prompts are not offered: send `instructions`",
    "max_tool_calls": "this server calls no tools itself: leave it out",
}


class ResponsesRequest(NeutralFields):
    """Body of `POST /v1/responses`."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str = Field(description="A name of `/v1/models`.")
    input: str | _Items = Field(
        description="A text, or items: messages, `function_call`, `function_call_output`. Items of reasoning are left out."
    )
    instructions: str | None = Field(None, description="A system message before the input.")
    max_output_tokens: int | None = Field(None, ge=1, description="Most new tokens.")
    temperature: float | None = Field(0.0, ge=0, le=2, description="0: always the most probable token.")
    top_p: float | None = Field(1.0, gt=0, le=1, description="As in chat completions.")
    stream: bool = Field(False, description="Send the answer as server-sent events.")
    stream_options: dict[str, Any] | None = Field(None, description="Ignored: events have no padding.")
    text: dict[str, Any] | None = Field(
        None, description="`format`: `text`, `json_object`, or `json_schema` with `name` and `schema`."
    )
    tools: Annotated[list[dict[str, Any]], Field(fail_fast=True)] | None = Field(
        None, description="Functions that the answer may call."
    )
    tool_choice: str | dict[str, Any] | None = Field(None, description="As in chat completions.")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call.")
    metadata: dict[str, Any] | None = Field(None, description="Sent back as it came.")
    user: str | None = Field(None, description="Ignored.")
    truncation: Literal["disabled"] | None = Field(None, description="Only `disabled`.")
    include: list[str] | None = Field(None, description="Ignored: nothing of it is made here.")
    reasoning: dict[str, Any] | None = Field(None, description="Only without `effort`: prompts have thinking off.")
    top_logprobs: Literal[0] | None = Field(None, description="Only 0.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_state(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for name, instead in _REFUSED.items():
                if values.get(name) is not None:
                    raise _refusal(name, instead)
            effort = (
                (values.get("reasoning") or {}).get("effort") if isinstance(values.get("reasoning"), dict) else None
            )
            if effort not in (None, "none"):
                raise _refusal("reasoning", "this server's prompts have thinking off: leave it out")
            return {name: value for name, value in values.items() if name not in _REFUSED}
        return values

    def as_chat(self) -> dict[str, Any]:
        """Return the body of the chat request."""
        items = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input
        messages = [{"role": "system", "content": self.instructions}] if self.instructions else []
        for item in items:
            _add(messages, item)
        chat: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "parallel_tool_calls": self.parallel_tool_calls,
        }
        wanted = (self.text or {}).get("format")
        if isinstance(wanted, dict) and wanted.get("type") == "json_schema":
            schema = {name: value for name, value in wanted.items() if name != "type"}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
        elif wanted is not None:
            chat["response_format"] = wanted
        if self.tools:
            chat["tools"] = [_as_tool(tool) for tool in self.tools]
            named = self.tool_choice
            if isinstance(named, dict):
                named = {"type": named.get("type"), "function": {"name": named.get("name")}}
            chat["tool_choice"] = named
        return chat


class ResponsesReply(BaseModel):
    """Reply of `POST /v1/responses` without `stream`."""

    id: str = Field(description="`resp_` and the request id.")
    object: Literal["response"] = Field(description="Always `response`.")
    created_at: int = Field(description="Unix seconds.")
    status: Literal["completed", "incomplete"] = Field(description="`incomplete`: cut off at max_output_tokens.")
    model: str = Field(description="As asked for.")
    output: list[dict[str, Any]] = Field(description="Items: a `message` with `output_text`, or `function_call`.")
    usage: dict[str, Any] = Field(description="`input_tokens`, `output_tokens`, `total_tokens`.")
    incomplete_details: dict[str, Any] | None = Field(description="Why it is incomplete.")
    store: Literal[False] = Field(description="Always false: nothing is stored.")


def _refusal(name: str, instead: str) -> PydanticCustomError:
    return PydanticCustomError(
        "wish", "{param} is not offered with this value: {instead}.", {"param": name, "instead": instead}
    )


def _as_tool(tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind != "function":
        raise_kind = str(kind)[:40]
        return {"type": raise_kind, "function": {"name": raise_kind}}
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _add(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """Add an item of the input to the messages of a chat."""
    kind = item.get("type", "message")
    if kind == "reasoning":
        return
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": _as_parts(item.get("output"))})
    else:
        messages.append({"role": item.get("role", kind), "content": _as_parts(item.get("content"))})


def _as_parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        name = _TEXTS.get(kind) if isinstance(kind, str) else None
        parts.append({"type": name, name: part.get(name)} if name is not None else part)
    return parts
