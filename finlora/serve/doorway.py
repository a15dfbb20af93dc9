"""What each path needs of its request: the server, the key that was let in, the request's id."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar, cast

from fastapi import Request

from finlora.serve.keys import KeyRecord
from finlora.serve.protocol import ErrorResponse
from finlora.serve.server import Server

_T = TypeVar("_T")

_WORDS = {
    400: "The request is malformed, or asks for what this model cannot do.",
    401: "The key is missing or not known.",
    403: "The key may not do that.",
    404: "There is no such model or path for this key.",
    408: "The answer was not complete in time.",
    413: "The body is too large.",
    422: "The adapter was made for another base, or is incomplete.",
    429: "The key has used its minute, or too many requests wait; `Retry-After` says how long.",
    500: "The server failed; its log says why under the request id.",
    503: "A stage of the model is down; ask again after `Retry-After` seconds.",
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": words} for status, words in _WORDS.items()
}
"""For the OpenAPI description."""


def server_of(request: Request) -> Server:
    return cast(Server, request.app.state.server)


def key_of(request: Request) -> KeyRecord:
    key = request.state.key
    assert isinstance(key, KeyRecord), "the guard lets nobody without a key come here"
    return key


def request_id_of(request: Request) -> str:
    return cast(str, request.state.request_id)


async def gather_all(works: Sequence[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Await all; the first failure cancels the others and is raised as it was."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
