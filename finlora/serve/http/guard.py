"""ASGI middleware before every endpoint: request id, API key and size limit of the body.

Plain ASGI, because a streamed answer must pass through unbuffered. Bodies, keys and answers are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import re
import secrets
import time
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finlora.errors import ConfigError
from finlora.serve.accounts.keys import KeyRecord, KeyRing
from finlora.serve.accounts.quota import Standings
from finlora.serve.failures import RefusedError, error_reply

_logger = logging.getLogger(__name__)

OPEN_PATHS = ("/healthz", "/health", "/ping", "/docs", "/")
OPEN_FOLDER = "/page/"
_DRAINED_BODIES = 4
"""Multiple of the largest body that is read and dropped before a connection is closed."""
_BODY_S = 60.0
"""Seconds in which a body must arrive. Otherwise clients that send a byte now and then could use up all connections."""
_DRAIN_S = 5.0
_MAX_DIGITS = 18
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_SECURITY_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


def _rate_header(what: str, kind: str) -> str:
    return f"x-ratelimit-{what}-{kind}"


_RATES = ("limit", "remaining", "reset")
RATE_HEADERS = tuple(_rate_header(what, kind) for kind in ("requests", "tokens") for what in _RATES)
"""OpenAI's headers of rate limits."""


class Guard:
    """Middleware that admits requests with a known key and a body within the limit.

    A request keeps its own `X-Request-Id`, so that the logs of client and server name it alike.

    Args:
        on_end: called with the route, status and seconds of each request.
        has_proxy: whether a proxy in front sets `X-Request-Id` on requests and responses, as Ray Serve's does.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: KeyRing,
        max_body_bytes: int,
        on_end: Callable[[str, int, float], None],
        *,
        has_proxy: bool,
    ) -> None:
        self._app, self._keys, self._max_body_bytes, self._on_end = app, keys, max_body_bytes, on_end
        self._has_proxy = has_proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started = time.monotonic()
        ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
        given = ids[0].decode("latin-1") if ids else ""  # the first, as Ray Serve does
        is_good = _REQUEST_ID.fullmatch(given) is not None
        request_id = given if is_good else f"req-{secrets.token_hex(12)}"
        state = scope.setdefault("state", {})
        state["request_id"], state["key"], state["standings"] = request_id, None, {}
        status, method = 0, scope["method"]
        if method == "HEAD":  # as GET (RFC 9110, section 9.3.2). uvicorn leaves the body out, by its own scope
            scope = {**scope, "method": "GET"}

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = list(message.get("headers", []))
                names = {name.lower() for name, _ in headers}
                headers += [pair for pair in _SECURITY_HEADERS if pair[0] not in names]
                headers += _limit_headers(state["standings"])
                if not self._has_proxy:
                    headers.append((b"x-request-id", request_id.encode()))
                message = {**message, "headers": headers}
            await send(message)

        received, has_more = 0, True

        async def receive_bounded() -> Message:
            nonlocal received, has_more
            if has_more:  # after the body only a disconnect can come, at any time
                try:
                    async with asyncio.timeout(started + _BODY_S - time.monotonic()):
                        message = await receive()
                except TimeoutError:
                    raise HTTPException(
                        408, f"the body was not complete after {_BODY_S:g} s: send it at once."
                    ) from None
            else:
                message = await receive()
            has_more = has_more and message.get("more_body", False)
            received += len(message.get("body", b"")) if message["type"] == "http.request" else 0
            if received > self._max_body_bytes:
                raise HTTPException(413, str(self._too_large()))  # FastAPI hides any other error while it reads a body
            return message

        try:
            try:
                if given and not is_good:
                    raise RefusedError(
                        400,
                        f"X-Request-Id has {len(given)} characters: expected 1 to 64 letters, digits, '.', '_' and '-', or none.",
                        "invalid_request_id",
                    )
                state["key"] = self._admit(scope)
                await self._app(scope, receive_bounded, send_marked)
            except RefusedError as refusal:
                await self._drain(receive)
                await error_reply(refusal)(scope, receive, send_marked)
        finally:
            seconds = time.monotonic() - started
            key: KeyRecord | None = state["key"]
            path = scope["path"] if len(scope["path"]) <= 100 else scope["path"][:100] + "..."
            _logger.info(
                "%s key=%s %s %r %d %.3f s",
                *(request_id, key.id if key else "-", method, path, status, seconds),
            )
            # Unknown paths share one name: with a metric for each a client could fill the memory.
            self._on_end(getattr(scope.get("route"), "path", "other"), status, seconds)

    def _admit(self, scope: Scope) -> KeyRecord | None:
        """Return the record of the request's key; None if the path needs none.

        Raises:
            RefusedError: the key is missing or unknown, or the body is declared too large.
        """
        headers = {name.lower(): value for name, value in scope["headers"]}
        path = scope["path"]
        record = None
        if path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            if scheme.lower() != "bearer" or not key:
                raise RefusedError(
                    401, "the request has no API key: send it as `Authorization: Bearer KEY`.", "missing_api_key"
                )
            try:
                record = self._keys.check(key.strip())
            except ConfigError as error:  # refuse everybody, and give the reason only to the log
                _logger.error("API keys cannot be checked: %s", error)
                raise RefusedError(503, "keys cannot be checked now: ask again later.", "no_keys", None, 5) from error
            if record is None:
                raise RefusedError(
                    401, "the API key is not known: ask the server's administrator for one.", "invalid_api_key"
                )
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or len(length) > _MAX_DIGITS or int(length) > self._max_body_bytes:
            raise self._too_large()
        return record

    async def _drain(self, receive: Receive) -> None:
        """Read and drop the body of a refused request, up to a bound: a client that still sends would miss the answer."""
        received, has_more = 0, True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_S):
                while has_more and received <= _DRAINED_BODIES * self._max_body_bytes:
                    message = await receive()
                    received += len(message.get("body", b""))
                    has_more = message.get("more_body", False)

    def _too_large(self) -> RefusedError:
        most = self._max_body_bytes
        return RefusedError(
            413, f"the body has more than {most:,} bytes: cut the text to what the question needs.", "too_large"
        )


def _limit_headers(standings: Standings) -> list[tuple[bytes, bytes]]:
    """Return OpenAI's headers of rate limits, such as `x-ratelimit-remaining-requests`. A key without limits has none."""
    return [
        (_rate_header(what, kind).encode(), value.encode())
        for kind, (limit, left, reset_s) in standings.items()
        for what, value in zip(_RATES, (str(limit), str(left), f"{math.ceil(reset_s)}s"), strict=True)
    ]
