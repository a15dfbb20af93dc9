"""Request context of an endpoint: the server, the admitted key and the request id; and its errors for OpenAPI."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar, cast

from fastapi import Request

from finlora.errors import QuotaError
from finlora.serve.accounts.keys import KeyRecord
from finlora.serve.accounts.ledger import Call
from finlora.serve.accounts.quota import Standing
from finlora.serve.http.server import Server
from finlora.serve.protocol import ErrorResponse

_T = TypeVar("_T")

WORDS = {
    400: "A field is wrong or unknown, or the model cannot do what it asks for.",
    401: "The key is missing or unknown.",
    403: "The key may not do that.",
    404: "There is no such model for this key, or no such path.",
    405: "The path takes another method; `Allow` names it.",
    408: "The answer was not complete within `limits.deadline_s`, or the body did not arrive within a minute.",
    413: "The body is larger than `limits.max_body_bytes`.",
    422: "The adapter was made for another base, tokenizer or template, or is incomplete.",
    429: "The key has reached its limit for this minute, or the queue is full. `Retry-After` says when to ask again, in seconds.",
    500: "The server failed. Its log says why, under the request id.",
    503: "A stage of the model is restarting, or keys cannot be checked. `Retry-After` says when to ask again, in seconds.",
}
"""HTTP status -> meaning, for the OpenAPI description and the documents."""


def errors_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the error responses of an endpoint for its OpenAPI description."""
    found: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": WORDS[status]} for status in statuses
    }
    # Without "default" FastAPI describes its own form of a 422, which no endpoint here sends.
    return {**found, "default": {"model": ErrorResponse, "description": "Any other error."}}


LOOKING_ERRORS = errors_of(401, 500, 503)
"""Errors of endpoints that only show something."""
ANSWERING_ERRORS = errors_of(400, 401, 404, 408, 413, 422, 429, 500, 503)
"""Errors of endpoints that ask the model."""


def server_of(request: Request) -> Server:
    return cast(Server, request.app.state.server)


def key_of(request: Request) -> KeyRecord:
    key = request.state.key
    assert isinstance(key, KeyRecord), "the guard admits no request without a key"
    return key


def request_id_of(request: Request) -> str:
    return cast(str, request.state.request_id)


async def open_call(request: Request, model: str) -> Call:
    """Admit a request (Server.open_call). The guard writes what its key may still use into the reply's headers."""
    key = key_of(request)
    try:
        call = await server_of(request).open_call(request_id_of(request), key, request.url.path, model)
    except QuotaError as error:
        limit = key.requests_per_minute if error.kind == "requests" else key.tokens_per_minute
        request.state.standings = {error.kind: Standing(limit or 0, 0, error.retry_after_s)}
        raise
    request.state.standings = call.standings
    return call


async def gather_all(works: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await all coroutines; the first exception cancels the others and is raised unchanged."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merge_streams(streams: Sequence[AsyncIterator[_T]]) -> AsyncIterator[tuple[int, _T]]:
    """Yield (index, item) of several streams as items come. The first exception, or leaving early, closes all of them."""
    if len(streams) == 1:  # mostly: without a task and a queue for each token
        async with contextlib.aclosing(streams[0]):  # type: ignore[type-var]
            async for only in streams[0]:
                yield 0, only
        return
    items: asyncio.Queue[tuple[int, _T | None, BaseException | None]] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[_T]) -> None:
        error: BaseException | None = None
        try:
            async with contextlib.aclosing(stream):  # type: ignore[type-var]
                async for item in stream:
                    items.put_nowait((index, item, None))
        except Exception as found:
            error = found
        items.put_nowait((index, None, error))

    tasks = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    num_open = len(tasks)
    try:
        while num_open:
            index, item, error = await items.get()
            if error is not None:
                raise error
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
