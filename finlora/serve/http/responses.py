"""Endpoint `/v1/responses` of OpenAI, stateless: the request as a chat request, the answer as a response or as its events.

Source: https://platform.openai.com/docs/api-reference/responses and .../responses-streaming.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError

from finlora.engine.request import Answer, Piece
from finlora.serve.failures import as_refusal, error_body
from finlora.serve.http.completions import count_usage, finish_reason, read_chat
from finlora.serve.http.context import ANSWERING_ERRORS, open_call, server_of
from finlora.serve.http.tool_calls import CallReader
from finlora.serve.protocol import ChatRequest
from finlora.serve.responses_body import ResponsesReply, ResponsesRequest

router = APIRouter(tags=["OpenAI"], responses=ANSWERING_ERRORS)


@router.post(
    "/v1/responses", response_model=None, responses={200: {"model": ResponsesReply}}, summary="Answer an input"
)
async def respond(body: ResponsesRequest, request: Request) -> Response:
    """Answer as OpenAI's responses do, without storing anything: send the whole conversation as `input`. With `stream` the
    answer comes as server-sent events from `response.created` to `response.completed` or `response.incomplete`."""
    server = server_of(request)
    try:
        asked = ChatRequest.model_validate(body.as_chat())
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    call = await open_call(request, body.model)
    prompt, sampling = await read_chat(asked, call, server)
    draft = _Draft(body, call.request_id, len(prompt.ids), has_tools=bool(asked.offered_tools))
    events = server.generate(call, prompt.text, prompt.ids, sampling)
    first = await anext(events)  # an error before it still gets its own HTTP status
    told = _tell(draft, first, events)
    if body.stream:
        return StreamingResponse(_send(told), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    async with contextlib.aclosing(told):  # type: ignore[type-var]
        async for _ in told:
            pass
    return JSONResponse(draft.show())


class _Draft:
    """Response while it is written: output items, filled by the deltas of an answer."""

    def __init__(self, body: ResponsesRequest, request_id: str, num_prompt: int, *, has_tools: bool) -> None:
        self._body, self._id, self._num_prompt = body, request_id, num_prompt
        self._created, self._status = int(time.time()), "in_progress"
        self._answer: Answer | None = None
        self._reader = CallReader() if has_tools else None
        self.items: list[dict[str, Any]] = []

    def open(self) -> list[dict[str, Any]]:
        return [{"type": f"response.{kind}", "response": self.show()} for kind in ("created", "in_progress")]

    def push(self, text: str) -> list[dict[str, Any]]:
        return self._take(self._reader.push(text) if self._reader else [{"content": text}])

    def close(self, answer: Answer) -> list[dict[str, Any]]:
        events = self._take(self._reader.finish()) if self._reader else []
        if not self.items:
            events += self._add(self._new_message())
        is_cut = finish_reason(answer) == "length"
        self._answer, self._status = answer, "incomplete" if is_cut else "completed"
        events += self._end(self._status)
        return [*events, {"type": f"response.{self._status}", "response": self.show()}]

    def show(self) -> dict[str, Any]:
        body, usage = self._body, None
        if self._answer is not None:
            counted = count_usage(self._num_prompt, [self._answer])
            usage = {
                "input_tokens": counted.prompt_tokens,
                "input_tokens_details": counted.prompt_tokens_details.model_dump(),
                "output_tokens": counted.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counted.total_tokens,
            }
        why = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": f"resp_{self._id}",
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": why,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": body.model,
            "output": [json.loads(json.dumps(item)) for item in self.items],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 0.0 if body.temperature is None else body.temperature,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": usage,
        }

    def _take(self, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        for delta in deltas:
            if text := delta.get("content"):
                if not self.items or self.items[-1]["type"] != "message":
                    events += self._add(self._new_message())
                self.items[-1]["content"][0]["text"] += text
                events.append(self._name("response.output_text.delta", delta=text, content_index=0, logprobs=[]))
            for part in delta.get("tool_calls", ()):
                if "id" in part:
                    events += self._add(
                        {
                            "type": "function_call",
                            "id": f"fc_{part['id']}",
                            "call_id": part["id"],
                            "name": part["function"]["name"],
                            "arguments": "",
                            "status": "in_progress",
                        }
                    )
                elif more := part["function"]["arguments"]:
                    self.items[-1]["arguments"] += more
                    events.append(self._name("response.function_call_arguments.delta", delta=more))
        return events

    def _add(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        events = self._end("completed") if self.items else []
        self.items.append(item)
        shown = item | ({"content": []} if item["type"] == "message" else {})
        events.append({"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": shown})
        if item["type"] == "message":
            events.append(self._name("response.content_part.added", content_index=0, part=dict(item["content"][0])))
        return events

    def _end(self, status: str) -> list[dict[str, Any]]:
        item = self.items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = dict(item["content"][0])
            events = [
                self._name("response.output_text.done", content_index=0, text=part["text"], logprobs=[]),
                self._name("response.content_part.done", content_index=0, part=part),
            ]
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._name("response.function_call_arguments.done", **done)]
        shown = json.loads(json.dumps(item))
        return [
            *events,
            {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": shown},
        ]

    def _name(self, kind: str, **more: Any) -> dict[str, Any]:
        index = len(self.items) - 1
        return {"type": kind, "item_id": self.items[index]["id"], "output_index": index, **more}

    def _new_message(self) -> dict[str, Any]:
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        name = f"msg_{self._id}_{len(self.items)}"
        return {"type": "message", "id": name, "role": "assistant", "status": "in_progress", "content": [part]}


async def _tell(
    draft: _Draft, first: Piece | Answer, events: AsyncIterator[Piece | Answer]
) -> AsyncIterator[dict[str, Any]]:
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        for event in draft.open():
            yield event
        item = first
        while isinstance(item, Piece):
            for event in draft.push(item.text):
                yield event
            item = await anext(events)
        for event in draft.close(item):
            yield event


async def _send(told: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    number = 0
    async with contextlib.aclosing(told):  # type: ignore[type-var]
        try:
            async for event in told:
                yield _frame(event | {"sequence_number": number})
                number += 1
        except Exception as error:
            found = error_body(as_refusal(error)).error
            yield _frame(
                {"type": "error", "code": found.code, "message": found.message, "param": found.param}
                | {"sequence_number": number}
            )


def _frame(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n"
