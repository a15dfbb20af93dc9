"""Endpoints `/v1/completions` and `/v1/chat/completions` of OpenAI: one reply, or server-sent events.

Source: OpenAI API reference, https://platform.openai.com/docs/api-reference/chat/streaming (chunks, usage event, `[DONE]`).
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from finlora.data.encode import encode_prompt, encode_text, encode_turns
from finlora.engine.request import Answer, Piece, Sampling
from finlora.errors import ConfigError
from finlora.serve.accounts.ledger import Call
from finlora.serve.conversation import Message, join_raw, list_turns
from finlora.serve.failures import RefusedError, as_refusal, error_body
from finlora.serve.http.context import ANSWERING_ERRORS, gather_all, open_call, server_of
from finlora.serve.http.logprobs import TokenRow, TokenRows, chat_logprobs, completion_logprobs, list_rows
from finlora.serve.http.server import Server
from finlora.serve.http.tool_calls import CallReader, describe_tools, join_deltas
from finlora.serve.protocol import (
    CachedTokens,
    ChatRequest,
    ChatResponse,
    CompletionRequest,
    CompletionResponse,
    GenerationRequest,
    Usage,
)
from finlora.serve.served_model import ServedBase

router = APIRouter(tags=["OpenAI"], responses=ANSWERING_ERRORS)


_Rows = Sequence[TokenRow] | None
"""Tokens with their log-probabilities; None if the request does not ask for them."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    text: str
    ids: tuple[int, ...]


@router.post(
    "/v1/chat/completions",
    response_model=None,
    responses={200: {"model": ChatResponse}},
    summary="Answer a conversation",
)
async def chat(body: ChatRequest, request: Request) -> Response:
    """Answer as OpenAI's chat completions do. With `stream` the answer comes as server-sent events, the last one `[DONE]`: their
    choices hold a `delta` in place of the `message`. An answer without `[DONE]` is not complete."""
    server = server_of(request)
    call = await open_call(request, body.model)
    text = json.dumps([[message.role, message.text] for message in body.messages], ensure_ascii=False)
    tools = body.offered_tools
    messages = describe_tools(tools, body.messages) if tools else body.messages
    prompt = _Prompt(text, encode_messages(messages, server.base, server.date_of(call)))
    grammar = await server.grammars.check(body)
    sampling = _sampling_of(body, prompt, server, body.max_completion_tokens or body.max_tokens, grammar)
    return await _reply(_Chat(server, call, bool(body.logprobs), body), body, [prompt], sampling)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": CompletionResponse}},
    summary="Continue a text",
)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue a text as OpenAI's completions do, without a template around it. With `stream`, events as for chat and
    one prompt only."""
    server = server_of(request)
    call = await open_call(request, body.model)
    prompts = _read_prompts(body, server)
    if body.stream and len(prompts) > 1:
        raise RefusedError(
            400, f"found {len(prompts)} prompts with stream=true: stream one.", "invalid_value", "prompt"
        )
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    sampling = _sampling_of(body, longest, server, body.max_tokens, await server.grammars.check(body))
    return await _reply(_Completion(server, call, body.logprobs is not None), body, prompts, sampling)


class _Chat:
    """Reply format of chat completions."""

    kind, prefix, piece_kind = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def __init__(self, server: Server, call: Call, has_logprobs: bool, body: ChatRequest) -> None:
        self.server, self.call, self.has_logprobs = server, call, has_logprobs
        self._has_tools, self._is_named = bool(body.offered_tools), body.named_tool is not None
        self._reader = CallReader()
        """Of a stream."""

    def whole(self, index: int, text: str, answer: Answer, rows: _Rows) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        reader = CallReader()
        if self._has_tools:
            message |= join_deltas([*reader.push(text), *reader.finish()])
        return {"index": index, "message": message} | self._rest(rows, answer, has_calls=reader.num_calls > 0)

    def first(self) -> dict[str, Any] | None:
        return {"index": 0, "delta": {"role": "assistant", "content": ""}} | self._rest(None)

    def piece(self, text: str, rows: _Rows) -> list[dict[str, Any]]:
        deltas = self._reader.push(text) if self._has_tools else [{"content": text}]
        return self._list_choices(deltas, rows)

    def last(self, answer: Answer, rows: _Rows) -> list[dict[str, Any]]:
        rest = self._list_choices(self._reader.finish(), None) if self._has_tools else []
        has_calls = self._reader.num_calls > 0
        return [*rest, {"index": 0, "delta": {}} | self._rest(rows or None, answer, has_calls=has_calls)]

    def _list_choices(self, deltas: Sequence[dict[str, Any]], rows: _Rows) -> list[dict[str, Any]]:
        """Return a choice for each delta; log-probabilities of text that is held back come without one."""
        filled = [*deltas] or ([{}] if rows else [])
        return [
            {"index": 0, "delta": delta} | self._rest(rows if number == 0 else None)
            for number, delta in enumerate(filled)
        ]

    def _rest(self, rows: _Rows, answer: Answer | None = None, *, has_calls: bool = False) -> dict[str, Any]:
        logprobs = None if rows is None else chat_logprobs(rows)
        reason = finish_reason(answer) if answer else None
        # As OpenAI: a call that the request named is no choice of the model.
        if reason == "stop" and has_calls and not self._is_named:
            reason = "tool_calls"
        return {"finish_reason": reason, "logprobs": logprobs}


class _Completion:
    """Reply format of completions."""

    kind, prefix, piece_kind = "text_completion", "cmpl", "text_completion"

    def __init__(self, server: Server, call: Call, has_logprobs: bool) -> None:
        self.server, self.call, self.has_logprobs = server, call, has_logprobs

    def whole(self, index: int, text: str, answer: Answer | None, rows: _Rows) -> dict[str, Any]:
        reason, logprobs = (
            finish_reason(answer) if answer else None,
            completion_logprobs(rows) if rows is not None else None,
        )
        return {"index": index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def first(self) -> dict[str, Any] | None:
        return None

    def piece(self, text: str, rows: _Rows) -> list[dict[str, Any]]:
        return [self.whole(0, text, None, rows)]

    def last(self, answer: Answer, rows: _Rows) -> list[dict[str, Any]]:
        return [self.whole(0, "", answer, rows or None)]


async def _reply(
    form: _Chat | _Completion, body: GenerationRequest, prompts: Sequence[_Prompt], sampling: Sampling
) -> Response:
    server, call = form.server, form.call
    frame = {"id": f"{form.prefix}-{call.request_id}", "created": int(time.time()), "model": body.model}
    if body.stream:
        (prompt,) = prompts
        events = server.generate(call, prompt.text, prompt.ids, sampling)
        # Await the first event here, so that an error before it still gets its own HTTP status.
        first = await anext(events)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage is True
        stream = _stream(form, frame | {"object": form.piece_kind}, first, events, len(prompt.ids), wants_usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    results = await gather_all(
        [_collect(server, call, prompt, sampling, index) for index, prompt in enumerate(prompts)]
    )
    tokenizer = server.base.tokenizer
    choices = [
        form.whole(index, text, answer, list_rows(answer, text, tokenizer) if form.has_logprobs else None)
        for index, (text, answer) in enumerate(results)
    ]
    usage = count_usage([(len(p.ids), answer) for p, (_, answer) in zip(prompts, results, strict=True)])
    return JSONResponse({**frame, "object": form.kind, "choices": choices, "usage": usage.model_dump()})


async def _stream(
    form: _Chat | _Completion,
    frame: dict[str, Any],
    first: Piece | Answer,
    events: AsyncIterator[Piece | Answer],
    num_prompt: int,
    wants_usage: bool,
) -> AsyncIterator[str]:
    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**frame, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    usage = {"usage": None} if wants_usage else {}
    rows = TokenRows(form.server.base.tokenizer) if form.has_logprobs else None
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        try:
            if (opening := form.first()) is not None:
                yield event([opening], **usage)
            item = first
            while isinstance(item, Piece):
                for choice in form.piece(item.text, rows.take(item) if rows else None):
                    yield event([choice], **usage)
                item = await anext(events)
            for choice in form.last(item, rows.finish(item) if rows else None):
                yield event([choice], **usage)
            if wants_usage:
                yield event([], usage=count_usage([(num_prompt, item)]).model_dump())
            yield "data: [DONE]\n\n"
        except Exception as error:
            # The status is sent already: send the error as an event, without a [DONE] after it.
            yield f"data: {error_body(as_refusal(error)).model_dump_json()}\n\n"


async def _collect(server: Server, call: Call, prompt: _Prompt, sampling: Sampling, index: int) -> tuple[str, Answer]:
    pieces: list[str] = []
    async for event in server.generate(call, prompt.text, prompt.ids, sampling, index):
        if isinstance(event, Answer):
            return "".join(pieces), event
        pieces.append(event.text)
    raise AssertionError("a stream ends with its answer or an error")


def finish_reason(answer: Answer) -> str:
    """Return OpenAI's word for why an answer ended."""
    return "length" if answer.finish == "length" else "stop"


def count_usage(answers: Sequence[tuple[int, Answer]]) -> Usage:
    """Return the token counts of pairs (number of prompt tokens, answer)."""
    num_prompt, num_new = sum(size for size, _ in answers), sum(len(answer.tokens) for _, answer in answers)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_new,
        total_tokens=num_prompt + num_new,
        prompt_tokens_details=CachedTokens(cached_tokens=sum(answer.num_cached for _, answer in answers)),
    )


def _sampling_of(
    body: GenerationRequest, prompt: _Prompt, server: Server, max_tokens: int | None, grammar: str
) -> Sampling:
    return server.make_sampling(
        prompt.ids,
        max_tokens=max_tokens,
        default_tokens=server.config.limits.default_new_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stop=body.stop_texts,
        seed=body.seed,
        grammar=grammar,
    )


def _read_prompts(body: CompletionRequest, server: Server) -> list[_Prompt]:
    base, prompt = server.base, body.prompt
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        ids = tuple(int(token) for token in prompt)
        size = len(base.tokenizer)
        if not all(0 <= token < size for token in ids):
            raise RefusedError(400, f"prompt holds ids outside 0 to {size - 1:,}.", "invalid_value", "prompt")
        return [_Prompt(json.dumps(ids), ids)]
    texts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
    if len(texts) > server.config.limits.max_texts:
        most = server.config.limits.max_texts
        raise RefusedError(
            400, f"found {len(texts):,} prompts: expected at most {most:,} in one request.", "invalid_value", "prompt"
        )
    prompts = [_Prompt(text, encode_prompt(text, base.tokenizer, "raw")) for text in texts]
    if not all(one.ids for one in prompts):
        raise RefusedError(
            400,
            "found an empty prompt: expected some text, since this base has no BOS token.",
            "invalid_value",
            "prompt",
        )
    return prompts


def encode_messages(messages: Sequence[Message], base: ServedBase, date: str | None) -> tuple[int, ...]:
    """Render a conversation up to the start of the assistant's next turn.

    Text that looks like a special token is encoded as plain characters, so that no message can end or open a turn.

    Args:
        date: date that the chat template writes: the adapter's, or the base's own.

    Raises:
        ConfigError: the base has no chat template and gets more than system messages and one user message, or its template
            refuses the turns.
    """
    turns = list_turns(messages)
    if base.template != "raw":
        return encode_turns(turns, base.tokenizer, base.template, date)
    text = join_raw(turns)
    if text is None:
        found = ", ".join(message.role for message in messages)
        raise ConfigError(
            f"messages hold {len(messages)} turns ({found}) and this base is served without turns (template raw): send one "
            "user message, with system messages before it, or write the whole prompt to /v1/completions."
        )
    return encode_turns([("user", text)], base.tokenizer, base.template, date)


def encode_plain(text: str, base: ServedBase) -> tuple[int, ...]:
    """Return the token ids of a text, without special tokens."""
    return tuple(encode_text(text, base.tokenizer))
