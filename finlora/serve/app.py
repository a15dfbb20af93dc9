"""The Ray Serve application: `serve deploy serve_configs/NAME.yaml`, or `finlora serve` on one machine.

Each replica is a copy of the server and holds a pipeline of stage actors of its own, so a stage that dies takes no HTTP server
with it: requests are refused at once until the replica has its stages again.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ray import serve

from finlora.serve.settings import read_settings

DEPLOYMENT = "Server"
_DRAIN_S = 60.0


@serve.deployment(
    name=DEPLOYMENT,
    max_ongoing_requests=1000,
    # A redeploy waits for answers under way.
    graceful_shutdown_timeout_s=_DRAIN_S,
    health_check_period_s=5.0,
    ray_actor_options={"num_cpus": 0.5},
)
@serve.ingress()
class ServerDeployment:
    """A replica.

    Raises:
        ConfigError: the settings are wrong, or there is no key.
        ModelError: the base's files are not usable.
        ResourceError: the cluster has too little for the stages.
    """

    def __init__(self, args: dict[str, Any]) -> None:
        from finlora.serve.audit import AuditLog
        from finlora.serve.engine import AsyncEngine
        from finlora.serve.keys import KeyRing
        from finlora.serve.measures import Measures
        from finlora.serve.model import open_pipeline, read_base
        from finlora.serve.server import Server

        _log_as_serve_does()
        config = read_settings(args)
        keys = KeyRing(Path(config.keys_file).expanduser() if config.keys_file else None, os.environ)
        base = read_base(config)
        audit = AuditLog(Path(config.audit_dir).expanduser()) if config.audit_dir else None
        engine = AsyncEngine(lambda: open_pipeline(config, base), config.max_adapters, config.ready_every_s)
        self.server = Server(config, base, engine, keys, Measures(), audit)
        engine.start()

    def __serve_build_asgi_app__(self) -> Any:
        from finlora.serve.asgi import make_app

        return make_app(self.server, has_proxy=True)

    def check_health(self) -> None:
        """Have Ray Serve replace the replica where its engine has ended; a lost stage is the engine's own to bring back."""
        if not self.server.engine.is_alive:
            raise RuntimeError("the engine's thread has ended")

    def __del__(self) -> None:
        if hasattr(self, "server"):
            self.server.engine.close()
            if self.server.audit is not None:
                self.server.audit.close()


def build(args: dict[str, Any]) -> serve.Application:
    """Return the application for the `args` of a Serve YAML; they are checked here, before any actor starts.

    Raises:
        ConfigError: every wrong setting, in one error.
    """
    read_settings(args)
    deployment: Any = ServerDeployment
    application: serve.Application = deployment.bind(args)
    return application


def _log_as_serve_does() -> None:
    """Write our lines where Ray Serve writes a replica's: in its log file, with the replica's name."""
    ours, theirs = logging.getLogger("finlora"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)
