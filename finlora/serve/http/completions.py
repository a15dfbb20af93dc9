"""Endpoints `/v1/completions` and `/v1/chat/completions` of OpenAI: one reply, or server-sent events.

Source: OpenAI API reference, https://platform.openai.com/docs/api-reference/chat/streaming (chunks, usage event, `[DONE]`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from finlora.data.encode import encode_prompt, encode_text, encode_turns
from finlora.engine.request import Answer, Piece, Sampling
from finlora.errors import ConfigError, counted
from finlora.serve.accounts.ledger import Call
from finlora.serve.conversation import Message, join_raw, list_turns
from finlora.serve.failures import RefusedError, as_refusal, error_body
from finlora.serve.http.context import ANSWERING_ERRORS, gather_all, merge_streams, open_call, server_of
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
class Prompt:
    """Prompt of a request."""

    text: str
    """As the client sent it, for the audit log."""
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
    prompt, sampling = await read_chat(body, call, server)
    return await _reply(lambda index: _Chat(server, call, index, body), body, [prompt], sampling)


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": CompletionResponse}},
    summary="Continue a text",
)
async def complete(body: CompletionRequest, request: Request) -> Response:
    """Continue a text as OpenAI's completions do, without a template around it. With `stream`, events as for chat."""
    server = server_of(request)
    call = await open_call(request, body.model)
    prompts = _read_prompts(body, server)
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    sampling = _sampling_of(body, longest, server, body.max_tokens, await server.grammars.check(body))
    return await _reply(lambda index: _Completion(server, call, index, body), body, prompts, sampling)


class _Chat:
    """Reply format of chat completions."""

    kind, prefix, piece_kind = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def __init__(self, server: Server, call: Call, index: int, body: ChatRequest) -> None:
        self.server, self.call, self.index, self.has_logprobs = server, call, index, bool(body.logprobs)
        self._has_tools, self._is_named = bool(body.offered_tools), body.named_tool is not None
        self._reader = CallReader()
        """Of a stream."""

    def whole(self, text: str, answer: Answer, rows: _Rows) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        reader = CallReader()
        if self._has_tools:
            message |= join_deltas([*reader.push(text), *reader.finish()])
        return {"index": self.index, "message": message} | self._rest(rows, answer, has_calls=reader.num_calls > 0)

    def first(self) -> dict[str, Any] | None:
        return {"index": self.index, "delta": {"role": "assistant", "content": ""}} | self._rest(None)

    def piece(self, text: str, rows: _Rows) -> list[dict[str, Any]]:
        deltas = self._reader.push(text) if self._has_tools else [{"content": text}]
        return self._list_choices(deltas, rows)

    def last(self, answer: Answer, rows: _Rows) -> list[dict[str, Any]]:
        rest = self._list_choices(self._reader.finish(), None) if self._has_tools else []
        has_calls = self._reader.num_calls > 0
        return [*rest, {"index": self.index, "delta": {}} | self._rest(rows or None, answer, has_calls=has_calls)]

    def _list_choices(self, deltas: Sequence[dict[str, Any]], rows: _Rows) -> list[dict[str, Any]]:
        """Return a choice for each delta; log-probabilities of text that is held back come without one."""
        filled = [*deltas] or ([{}] if rows else [])
        return [
            {"index": self.index, "delta": delta} | self._rest(rows if number == 0 else None)
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

    def __init__(self, server: Server, call: Call, index: int, body: CompletionRequest) -> None:
        self.server, self.call, self.index, self.has_logprobs = server, call, index, body.logprobs is not None

    def whole(self, text: str, answer: Answer | None, rows: _Rows) -> dict[str, Any]:
        reason, logprobs = (
            finish_reason(answer) if answer else None,
            completion_logprobs(rows) if rows is not None else None,
        )
        return {"index": self.index, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def first(self) -> dict[str, Any] | None:
        return None

    def piece(self, text: str, rows: _Rows) -> list[dict[str, Any]]:
        return [self.whole(text, None, rows)]

    def last(self, answer: Answer, rows: _Rows) -> list[dict[str, Any]]:
        return [self.whole("", answer, rows or None)]


async def _reply(
    make_form: Callable[[int], _Chat | _Completion],
    body: GenerationRequest,
    prompts: Sequence[Prompt],
    sampling: Sampling,
) -> Response:
    """Return the reply with `n` answers to each prompt.

    Args:
        make_form: reply format of the answer of an index.
    """
    asked = [
        (prompt, sampling if body.seed is None else dataclasses.replace(sampling, seed=_wrap(body.seed + number)))
        for prompt in prompts
        for number in range(body.num_answers)
    ]
    forms = [make_form(index) for index in range(len(asked))]
    server, call = forms[0].server, forms[0].call
    if len(asked) > server.config.limits.max_texts:
        raise RefusedError(
            400,
            f"found {counted(len(prompts), 'prompt')} with n={body.num_answers}: expected at most "
            f"{server.config.limits.max_texts:,} answers in one request.",
            "invalid_value",
            "n",
        )
    frame = {"id": f"{forms[0].prefix}-{call.request_id}", "created": int(time.time()), "model": body.model}
    num_prompt = sum(len(prompt.ids) for prompt in prompts)
    if body.stream:
        events = merge_streams(
            [server.generate(call, prompt.text, prompt.ids, own, index) for index, (prompt, own) in enumerate(asked)]
        )
        # Await the first event here, so that an error before it still gets its own HTTP status.
        first = await anext(events)
        wants_usage = body.stream_options is not None and body.stream_options.include_usage is True
        stream = _stream(forms, frame | {"object": forms[0].piece_kind}, first, events, num_prompt, wants_usage)
        return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    results = await gather_all(
        [_collect(server, call, prompt, own, index) for index, (prompt, own) in enumerate(asked)]
    )
    tokenizer = server.base.tokenizer
    choices = [
        form.whole(text, answer, list_rows(answer, text, tokenizer) if form.has_logprobs else None)
        for form, (text, answer) in zip(forms, results, strict=True)
    ]
    usage = count_usage(num_prompt, [answer for _, answer in results])
    return JSONResponse({**frame, "object": forms[0].kind, "choices": choices, "usage": usage.model_dump()})


def _wrap(seed: int) -> int:
    """Return a seed within the 64 bits that a request may send."""
    return (seed + 2**63) % 2**64 - 2**63


async def _stream(
    forms: Sequence[_Chat | _Completion],
    frame: dict[str, Any],
    first: tuple[int, Piece | Answer],
    events: AsyncIterator[tuple[int, Piece | Answer]],
    num_prompt: int,
    wants_usage: bool,
) -> AsyncIterator[str]:
    def event(choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {json.dumps({**frame, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

    usage = {"usage": None} if wants_usage else {}
    rows = [TokenRows(form.server.base.tokenizer) if form.has_logprobs else None for form in forms]
    answers: list[Answer] = []
    async with contextlib.aclosing(events):  # type: ignore[type-var]
        try:
            for form in forms:
                if (opening := form.first()) is not None:
                    yield event([opening], **usage)
            index, item = first
            while True:
                form, own = forms[index], rows[index]
                if isinstance(item, Piece):
                    choices = form.piece(item.text, own.take(item) if own else None)
                else:
                    answers.append(item)
                    choices = form.last(item, own.finish(item) if own else None)
                for choice in choices:
                    yield event([choice], **usage)
                if len(answers) == len(forms):
                    break
                index, item = await anext(events)
            if wants_usage:
                yield event([], usage=count_usage(num_prompt, answers).model_dump())
            yield "data: [DONE]\n\n"
        except Exception as error:
            # The status is sent already: send the error as an event, without a [DONE] after it.
            yield f"data: {error_body(as_refusal(error)).model_dump_json()}\n\n"


async def _collect(server: Server, call: Call, prompt: Prompt, sampling: Sampling, index: int) -> tuple[str, Answer]:
    pieces: list[str] = []
    async for event in server.generate(call, prompt.text, prompt.ids, sampling, index):
        if isinstance(event, Answer):
            return "".join(pieces), event
        pieces.append(event.text)
    raise AssertionError("a stream ends with its answer or an error")


def finish_reason(answer: Answer) -> str:
    """Return OpenAI's word for why an answer ended."""
    return "length" if answer.finish == "length" else "stop"


def count_usage(num_prompt: int, answers: Sequence[Answer]) -> Usage:
    """Return the token counts of a request.

    Args:
        num_prompt: tokens of its prompts, each counted once.
    """
    num_new = sum(len(answer.tokens) for answer in answers)
    return Usage(
        prompt_tokens=num_prompt,
        completion_tokens=num_new,
        total_tokens=num_prompt + num_new,
        prompt_tokens_details=CachedTokens(cached_tokens=min(num_prompt, sum(answer.num_cached for answer in answers))),
    )


async def read_chat(body: ChatRequest, call: Call, server: Server) -> tuple[Prompt, Sampling]:
    """Return the prompt of a conversation with its tools, and how to answer it.

    Raises:
        ConfigError: as `encode_messages`.
        RefusedError: a field asks for what cannot be done.
    """
    text = json.dumps([[message.role, message.text] for message in body.messages], ensure_ascii=False)
    tools = body.offered_tools
    messages = describe_tools(tools, body.messages) if tools else body.messages
    prompt = Prompt(text, encode_messages(messages, server.base, server.date_of(call)))
    grammar = await server.grammars.check(body)
    return prompt, _sampling_of(body, prompt, server, body.max_completion_tokens or body.max_tokens, grammar)


def _sampling_of(
    body: ChatRequest | CompletionRequest, prompt: Prompt, server: Server, max_tokens: int | None, grammar: str
) -> Sampling:
    size = len(server.base.tokenizer)
    if strange := [token for token, _ in body.biases if token >= size]:
        raise RefusedError(
            400,
            f"logit_bias names token {strange[0]:,}: expected ids from 0 to {size - 1:,}.",
            "invalid_value",
            "logit_bias",
        )
    return server.make_sampling(
        prompt.ids,
        max_tokens=max_tokens,
        default_tokens=server.config.limits.default_new_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stop=body.stop_texts,
        seed=body.seed,
        top_k=max(body.top_k or 0, 0),
        min_p=body.min_p or 0.0,
        logit_bias=body.biases,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        min_tokens=body.min_tokens or 0,
        ignore_end=bool(body.ignore_eos),
        num_top=body.num_top,
        grammar=grammar,
    )


def _read_prompts(body: CompletionRequest, server: Server) -> list[Prompt]:
    base, prompt = server.base, body.prompt
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        ids = tuple(int(token) for token in prompt)
        size = len(base.tokenizer)
        if not all(0 <= token < size for token in ids):
            raise RefusedError(400, f"prompt holds ids outside 0 to {size - 1:,}.", "invalid_value", "prompt")
        return [Prompt(json.dumps(ids), ids)]
    texts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
    if len(texts) > server.config.limits.max_texts:
        most = server.config.limits.max_texts
        raise RefusedError(
            400, f"found {len(texts):,} prompts: expected at most {most:,} in one request.", "invalid_value", "prompt"
        )
    prompts = [Prompt(text, encode_prompt(text, base.tokenizer, "raw")) for text in texts]
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
