"""HTTP process at a server's direct port, which bypasses Ray Serve's proxy. The engine runs in the replica's process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import uvicorn

from finlora.errors import ResourceError
from finlora.serve.accounts.audit import AuditLog
from finlora.serve.accounts.keys import KeyRing
from finlora.serve.accounts.ledger import Meter
from finlora.serve.deploy.direct_port import certificate_of, check_certificate, listen_shared
from finlora.serve.http.asgi import make_app
from finlora.serve.http.server import Server
from finlora.serve.live.remote_engine import RemoteEngine
from finlora.serve.served_model import read_base
from finlora.serve.settings import ServeConfig

DRAIN_S = 50.0
"""Seconds in which the processes must end. Ray Serve gives a replica 60 in all, and waits for the proxy's requests first."""
_ANSWER_S, _CUT_S = 40, 2.0
"""Seconds of these for the answers in flight, and then for the audit entries of answers that are cut off."""
_SILENCE_CHECK_S = 5.0
_POLL_S = 0.02


async def answer_http(
    config: ServeConfig,
    hub: Path,
    meter: Meter,
    opened: asyncio.Event,
    closing: asyncio.Event,
    metrics: str | None = None,
) -> None:
    """Answer requests until `closing` is set or the hub is gone, then finish the answers in flight.

    Args:
        hub: socket of the engine's hub.
        opened: set once the port accepts connections.
        metrics: address of Ray's metrics on this node.

    Raises:
        ConfigError: the certificate cannot be used.
        ResourceError: the port is taken.
    """
    keys = KeyRing(config.keys_path, os.environ)
    base = read_base(config)
    async with contextlib.AsyncExitStack() as stack:
        audit = AuditLog(config.audit_folder) if config.audit_folder else None
        if audit is not None:
            stack.callback(audit.close)
        engine = await RemoteEngine.open(hub)
        following = asyncio.ensure_future(engine.follow())

        async def leave() -> None:
            engine.close()
            await following

        stack.push_async_callback(leave)
        server = Server(config, base, engine, keys, meter, audit, quota=engine)
        server.metrics_address = metrics
        web = _make_web(server)
        listener = stack.enter_context(listen_shared(config.direct))
        serving = asyncio.ensure_future(web.serve(sockets=[listener]))
        while not web.started:
            if serving.done():
                await serving  # raises the error that kept it from listening
                raise ResourceError(f"nothing listens at direct.port={config.direct.port}: see the log of HttpProcess.")
            await asyncio.sleep(_POLL_S)
        opened.set()
        ends = [serving, following, asyncio.ensure_future(closing.wait())]
        silent_since: dict[object, float] = {}
        while not any(end.done() for end in ends):
            await asyncio.wait(ends, timeout=_SILENCE_CHECK_S, return_when=asyncio.FIRST_COMPLETED)
            _close_silent(web, silent_since, config.direct.keep_alive_timeout_s)
        ends[-1].cancel()
        web.should_exit = True
        await serving
        if cut := list(web.server_state.tasks):  # uvicorn has cancelled them: wait for their audit entries
            await asyncio.wait(cut, timeout=_CUT_S)


def _close_silent(web: uvicorn.Server, since: dict[object, float], most_s: float) -> None:
    """Close connections without any request. uvicorn's own timeout covers only those that have had an answer.

    Args:
        since: connection -> time when it was first seen without a request.
    """
    now = time.monotonic()
    silent = [each for each in web.server_state.connections if getattr(each, "cycle", None) is None]
    for each in [each for each in since if each not in silent]:
        del since[each]
    for each in silent:
        if now - since.setdefault(each, now) >= most_s and (transport := getattr(each, "transport", None)) is not None:
            transport.close()


def _make_web(server: Server) -> uvicorn.Server:
    direct = server.config.direct
    check_certificate(direct)
    certificate, key = certificate_of(direct)
    settings = uvicorn.Config(
        make_app(server, has_proxy=False),
        lifespan="off",  # the replica sets the engine's gauges, this process must not set them again
        ws="none",
        log_config=None,
        access_log=False,  # the guard logs each request
        server_header=False,
        proxy_headers=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_keep_alive=direct.keep_alive_timeout_s,
        timeout_graceful_shutdown=_ANSWER_S,
    )
    return uvicorn.Server(settings)
