"""Ray Serve application: `serve deploy serve_configs/NAME.yaml`, or `finlora serve` on one machine.

Each replica owns a pipeline of stage actors. A stage crash therefore ends no HTTP server: the replica refuses requests at once
until its stages run again. With a direct port, HTTP processes of the replica answer there and reach the engine through a hub.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from ray import serve

from finlora.errors import ConfigError
from finlora.serve.settings import read_settings

DEPLOYMENT = "Server"
_DRAIN_S = 60.0


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=1000,
    # A redeployment waits for answers in flight.
    graceful_shutdown_timeout_s=_DRAIN_S,
    health_check_period_s=5.0,
    ray_actor_options={"num_cpus": 0.5},
)
@serve.ingress()
class ServerDeployment:
    """Replica of the server.

    Raises:
        ConfigError: the settings are wrong, or there is no key.
        ModelError: the base's files are not usable.
        ResourceError: the cluster has too few GPUs or cores for the stages, or the direct port is taken.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        from finlora.cluster.connect import find_metrics_address
        from finlora.cluster.holdings import name_service
        from finlora.serve.accounts.audit import AuditLog
        from finlora.serve.accounts.keys import KeyRing
        from finlora.serve.accounts.prometheus import Measures
        from finlora.serve.accounts.quota import Quota
        from finlora.serve.deploy.direct_port import check_certificate, listen_shared
        from finlora.serve.deploy.http_pool import HttpPool
        from finlora.serve.http.server import Server
        from finlora.serve.live.engine_hub import Hub
        from finlora.serve.live.engine_thread import AsyncEngine
        from finlora.serve.served_model import open_pipeline, read_base

        _log_as_serve_does()
        self._closers = contextlib.ExitStack()
        config = read_settings(args)
        keys = KeyRing(config.keys_path, os.environ)
        base = read_base(config)
        service = name_service(serve.get_replica_context().app_name)
        audit = AuditLog(config.audit_folder) if config.audit_folder else None
        if audit is not None:
            self._closers.callback(audit.close)
        self._engine = AsyncEngine(
            lambda: open_pipeline(config, base, service), config.max_adapters, config.ready_every_s
        )
        if config.direct.port is not None:  # check before the model takes minutes to load
            check_certificate(config.direct)
            listen_shared(config.direct).close()
        quota = Quota(time.monotonic)
        self._server = Server(config, base, self._engine, keys, Measures(), audit, quota)
        self._server.metrics_address = find_metrics_address()
        self._server.shelf.log_notices()
        self._engine.start()
        self._closers.callback(self._engine.close)
        self._http_pool: HttpPool | None = None
        if config.direct.port is not None:
            # A private folder: in Ray's own, another user could replace the socket.
            folder = self._closers.enter_context(tempfile.TemporaryDirectory(prefix="finlora-"))
            hub = Hub(self._engine, quota, Path(folder) / "hub")
            hub.start()
            self._closers.callback(hub.close)
            self._http_pool = HttpPool(config, hub.path, self._server.metrics_address)
            self._closers.callback(self._http_pool.close)

    def __serve_build_asgi_app__(self) -> Any:
        from finlora.serve.http.asgi import make_app

        return make_app(self._server, has_proxy=True)

    def check_health(self) -> None:
        """Raise if the engine has ended, so that Ray Serve restarts the replica. The engine itself recovers stage crashes."""
        if not self._engine.is_alive:
            raise RuntimeError("the engine's thread has ended")
        if self._http_pool is not None:
            self._http_pool.check()

    def __del__(self) -> None:
        if hasattr(self, "_closers"):
            self._closers.close()


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for the `args` of a Serve YAML. They are checked here, before any actor starts.

    Raises:
        ConfigError: every wrong setting, in one error.
    """
    if (port := read_settings(args).metrics_port) is not None:
        raise ConfigError(
            f"metrics_port={port} holds only under `finlora serve`: leave it out, and give the port to "
            "`ray start --metrics-export-port`."
        )
    deployment: Any = ServerDeployment
    application: serve.Application = deployment.bind(args)
    return application


def _log_as_serve_does() -> None:
    """Send FinLoRA's log lines to the replica's Ray Serve log file, with the replica's name."""
    ours, theirs = logging.getLogger("finlora"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)
