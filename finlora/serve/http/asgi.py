"""ASGI application of one replica: endpoints, error handlers and the guard around them. Does not use Ray."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from finlora.data.sets.prepare import code_version
from finlora.errors import FinloraError
from finlora.serve.body_faults import invalid_body
from finlora.serve.failures import RefusedError, error_reply, from_http
from finlora.serve.http import completions, finance, responses, status, tokens
from finlora.serve.http.guard import OPEN_PATHS, RATE_HEADERS, Guard
from finlora.serve.http.server import Server
from finlora.serve.http.web_page import PAGE_HEADERS, describe_api, page_router

_logger = logging.getLogger(__name__)
_SHOW_EVERY_S = 1.0
_DESCRIPTION = """A Llama base with adapters for financial questions, on your own GPUs.

Every path but `/healthz` and the web page at `/` needs a key: `Authorization: Bearer KEY`. Each answer carries an
`X-Request-Id`, which the server's log and audit log name too; send one of your own (up to 64 letters, digits, `.`, `_`, `-`)
and it is kept. Errors have OpenAI's form. Limits: one answer a request (`n`
is 1), log-probabilities of the chosen tokens alone."""


def make_app(server: Server, *, has_proxy: bool) -> ASGIApp:
    """Return the application of a server whose engine runs.

    Args:
        has_proxy: whether a proxy in front of it sets `X-Request-Id` on requests and responses.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        task = asyncio.ensure_future(_show_gauges(server))
        yield
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    app = FastAPI(
        title="FinLoRA",
        version=code_version(),
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,  # both documentation pages load scripts from other hosts
        redoc_url=None,
    )
    app.state.server = server
    _describe_keys(app)
    for router in (completions.router, responses.router, finance.router, tokens.router, status.router, page_router()):
        app.include_router(router)

    @app.get("/docs", include_in_schema=False)
    async def show_api() -> HTMLResponse:
        return HTMLResponse(describe_api(app.openapi()), headers=PAGE_HEADERS)

    @app.exception_handler(RequestValidationError)
    async def answer_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return error_reply(invalid_body(error, request.headers.get("content-type", "")))

    @app.exception_handler(HTTPException)
    async def answer_http(_request: Request, error: HTTPException) -> JSONResponse:
        reply = error_reply(from_http(error))
        reply.headers.update(error.headers or {})  # `Allow` goes with 405 (RFC 9110, section 15.5.6)
        return reply

    async def answer_known(_request: Request, error: Exception) -> JSONResponse:
        return error_reply(error)

    app.add_exception_handler(FinloraError, answer_known)
    app.add_exception_handler(RefusedError, answer_known)

    @app.exception_handler(Exception)
    async def answer_unknown(request: Request, error: Exception) -> JSONResponse:
        _logger.error("%s failed", request.state.request_id, exc_info=error)
        return error_reply(error)

    most = server.config.limits.max_body_bytes
    guard = Guard(app, server.keys, most, server.meter.count_request, has_proxy=has_proxy)
    if not server.config.allowed_origins:
        return guard
    # Outside the guard: a browser asks for permission without the key (https://fetch.spec.whatwg.org/#cors-preflight-fetch).
    return CORSMiddleware(
        guard,
        allow_origins=server.config.allowed_origins,
        allow_methods=("GET", "HEAD", "POST"),
        allow_headers=("*",),
        expose_headers=("X-Request-Id", "Retry-After", *RATE_HEADERS),
    )


def _describe_keys(app: FastAPI) -> None:
    """Add the key to the OpenAPI description, for all paths but those that need none."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = describe()
            found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            found["security"] = [{"key": []}]
            for path in set(OPEN_PATHS) & set(found["paths"]):
                for call in found["paths"][path].values():
                    call["security"] = []
        return cast(dict[str, Any], app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]


async def _show_gauges(server: Server) -> None:
    while True:
        server.meter.show(server.engine.snapshot, is_ready=bool(server.engine.stages))
        await asyncio.sleep(_SHOW_EVERY_S)
