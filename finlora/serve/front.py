"""One of the processes that answer at a server's own port, past Ray Serve's proxy; the engine is in the replica's process."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import uvicorn

from finlora.serve.asgi import make_app
from finlora.serve.audit import AuditLog
from finlora.serve.doors import check_certificate, listen_shared
from finlora.serve.keys import KeyRing
from finlora.serve.ledger import Meter
from finlora.serve.model import read_base
from finlora.serve.remote import RemoteEngine
from finlora.serve.server import Server
from finlora.serve.settings import ServeConfig

DRAIN_S = 50.0
"""Seconds that answers under way have to end; Ray Serve gives the replica 60 for all that it does."""
_POLL_S = 0.02


async def answer_http(
    config: ServeConfig, hub: Path, meter: Meter, opened: asyncio.Event, closing: asyncio.Event
) -> None:
    """Answer until `closing` is set or the hub is gone; answers under way come to their end.

    Args:
        hub: socket of the process that drives the engine.
        opened: set when the port answers.

    Raises:
        ConfigError: the certificate cannot be used.
        ResourceError: the port is taken by others.
    """
    keys = KeyRing(Path(config.keys_file).expanduser() if config.keys_file else None, os.environ)
    base = read_base(config)
    audit = AuditLog(Path(config.audit_dir).expanduser()) if config.audit_dir else None
    engine = await RemoteEngine.open(hub)
    following = asyncio.ensure_future(engine.follow())
    try:
        server = Server(config, base, engine, keys, meter, audit, quota=engine)
        web = _make_web(server)
        with listen_shared(config.direct) as listener:
            serving = asyncio.ensure_future(web.serve(sockets=[listener]))
            while not web.started and not serving.done():
                await asyncio.sleep(_POLL_S)
            opened.set()
            until = asyncio.ensure_future(closing.wait())
            await asyncio.wait([serving, following, until], return_when=asyncio.FIRST_COMPLETED)
            until.cancel()
            web.should_exit = True
            await serving
    finally:
        engine.close()
        await following
        if audit is not None:
            audit.close()


def _make_web(server: Server) -> uvicorn.Server:
    direct = server.config.direct
    check_certificate(direct)
    settings = uvicorn.Config(
        make_app(server, has_proxy=False),
        lifespan="off",  # which would show the gauges of the one engine once more
        ws="none",
        log_config=None,
        access_log=False,  # the server writes its own line a request
        server_header=False,
        proxy_headers=False,
        ssl_certfile=direct.ssl_certfile,
        ssl_keyfile=direct.ssl_keyfile,
        timeout_keep_alive=direct.keep_alive_timeout_s,
        timeout_graceful_shutdown=int(DRAIN_S),
    )
    return uvicorn.Server(settings)
