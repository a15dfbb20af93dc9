"""Replies in OpenAI's form while no copy of the server answers: before Ray Serve's proxy listens, and in the proxy itself.

`finlora serve` listens at the proxy's port from its start (StartUpDoor), until the proxy listens there too. The proxy then
answers 503 until a copy has loaded the model and again while the server ends (ProxyReplies); Ray Serve's own replies there
are plain text, and requests would wait for the copy.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from finlora.serve.failures import RefusedError, error_body, error_reply

_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Read by Ray Serve's proxy when it starts."""
_RETRY_S = 5
_MOST_BODY_BYTES = 2**25
_PROXYS_STATUSES = (404, 408, 500, 503)
"""Of replies that the proxy writes itself."""
_COPYS_HEADER = b"x-content-type-options"
"""Of each reply of a copy (finlora/serve/http/guard.py); the proxy's own replies lack it."""


def _not_up() -> RefusedError:
    return RefusedError(
        503,
        f"no copy of the server can answer now: it is starting, ending or full. Ask again in {_RETRY_S} s.",
        "not_ready",
        retry_after_s=_RETRY_S,
    )


class _Handler(BaseHTTPRequestHandler):
    """Answers every request with 503."""

    timeout = 5.0
    protocol_version = "HTTP/1.0"  # one request a connection: the proxy takes the next one

    def handle_one_request(self) -> None:
        self.raw_requestline = self.rfile.readline(65537)
        if not self.raw_requestline or not self.parse_request():
            return
        length = self.headers.get("Content-Length", "0")
        with contextlib.suppress(TimeoutError):  # a client that still sends would miss the answer
            self.rfile.read(min(int(length) if length.isdigit() else 0, _MOST_BODY_BYTES))
        body = error_body(_not_up()).model_dump_json().encode()
        self.send_response(503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", str(_RETRY_S))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: paths may be confidential."""


class _Listener(ThreadingHTTPServer):
    allow_reuse_port = True  # the proxy sets SO_REUSEPORT too, so that both can listen until one closes
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, http: dict[str, Any]) -> None:
        self.address_family = socket.getaddrinfo(http["host"], http["port"], type=socket.SOCK_STREAM)[0][0]
        super().__init__((http["host"], http["port"]), _Handler)
        self._tls: ssl.SSLContext | None = None
        if http.get("ssl_certfile"):
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(
                http["ssl_certfile"], http.get("ssl_keyfile"), http.get("ssl_keyfile_password") or ""
            )

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._tls is not None:  # in the request's own thread, since a client may be slow
            request.settimeout(_Handler.timeout)
            request = self._tls.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client went away, or spoke another protocol."""


class StartUpDoor:
    """Listener at the proxy's address that answers 503 until `close`.

    Args:
        http: options of Ray Serve's proxy. The port must be free.

    Raises:
        OSError: the port cannot be opened, or the certificate cannot be used.
    """

    def __init__(self, http: dict[str, Any]) -> None:
        self._listener = _Listener(http)
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer the connections that the kernel has given to this listener, and stop listening. Again: does nothing."""
        if not self._thread.is_alive():
            return
        self._listener.shutdown()
        self._thread.join()
        self._listener.timeout = 0.05
        while select.select([self._listener.fileno()], [], [], 0)[0]:
            self._listener.handle_request()
        self._listener.server_close()


@contextlib.contextmanager
def open_door(http: dict[str, Any]) -> Iterator[StartUpDoor]:
    """Answer 503 at the proxy's address until the door is closed or the block left."""
    door = StartUpDoor(http)
    try:
        yield door
    finally:
        door.close()


class ProxyReplies:
    """Middleware of Ray Serve's proxy: what the proxy says itself comes in OpenAI's form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/-/"):  # Ray Serve's own health checks
            await self._app(scope, receive, send)
            return
        if _waits_for_copy(self._app, scope["path"]):
            await error_reply(_not_up())(scope, receive, send)
            return
        is_replaced = False

        async def send_ours(message: Message) -> None:
            nonlocal is_replaced
            if message["type"] == "http.response.start":
                names = {bytes(name).lower() for name, _ in message.get("headers", ())}
                is_replaced = _COPYS_HEADER not in names and message["status"] in _PROXYS_STATUSES
                if is_replaced:
                    kept = [pair for pair in message.get("headers", ()) if bytes(pair[0]).lower() == b"x-request-id"]
                    reply = error_reply(_replace(message["status"]))
                    start = {
                        "type": message["type"],
                        "status": reply.status_code,
                        "headers": [*reply.raw_headers, *kept],
                    }
                    await send(start)
                    await send({"type": "http.response.body", "body": reply.body})
                    return
            elif is_replaced:
                return
            await send(message)

        await self._app(scope, receive, send_ours)


def _replace(status: int) -> RefusedError:
    if status in (404, 503):  # no route leads to a server: it is not there yet, or not any more
        return _not_up()
    if status == 408:
        return RefusedError(408, "no answer was complete in the proxy's time: ask for less, or later.", "deadline")
    return RefusedError(
        status, "the copy of the server that had this request failed: send it again.", "copy_lost", retry_after_s=1
    )


def _waits_for_copy(app: Any, path: str) -> bool:
    """Return whether a route leads to a server of which no copy has been ready yet. Ray Serve would let the request wait."""
    while not hasattr(app, "proxy_router"):
        app = getattr(app, "app", None) or getattr(app, "_app", None)
        if app is None:
            return False
    found = app.proxy_router.match_route(path)
    return found is not None and not found[1].running_replicas_populated()


def list_middlewares() -> list[Any]:
    """Return what Ray Serve's proxy puts around itself."""
    from starlette.middleware import Middleware

    return [Middleware(ProxyReplies)]


def set_proxy_replies(options: dict[str, Any]) -> None:
    """Let the proxy of a Ray that this process starts answer with ProxyReplies.

    Not for a server that starts with no copy: a request that waits is what starts the first one.

    Args:
        options: of Ray Serve's deployment.
    """
    scaling = options.get("autoscaling_config") or {}
    if scaling.get("initial_replicas", scaling.get("min_replicas", 1)) != 0:
        os.environ.setdefault(_CALLBACK, f"{__name__}:{list_middlewares.__name__}")
