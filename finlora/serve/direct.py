"""A port at which the server answers by itself, beside Ray Serve's proxy: a request then costs a third of the processor time.

Behind the proxy each request is a call of an actor, whose parts travel one by one; 1.9 of 2.9 ms a request in the server's
process are that. Ray Serve's name for the other way is direct ingress. The same guard stands before both.

Source: https://github.com/ray-project/ray/blob/ray-2.60.0/python/ray/serve/_private/constants.py
"""

from __future__ import annotations

import os

from finlora.errors import ConfigError


def open_direct_port(port: int) -> None:
    """Have the server of a Ray that this process is about to start listen at a port of its own.

    Raises:
        ConfigError: a Ray that runs already is named, whose settings are its own.
    """
    if address := os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"--direct-port={port} with RAY_ADDRESS={address}: a cluster that runs has its own settings. Set "
            "RAY_SERVE_ENABLE_DIRECT_INGRESS=1 where its nodes start; copies then listen from port 30000 on."
        )
    os.environ |= {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(port + 1),  # not itself included
        # A copy that is started again has the same port at once, and one that ends waits for its answers alone.
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
    }


def require_one_copy(port: int, proxy_port: int, num_replicas: int) -> None:
    """Check what a direct port leads to.

    Raises:
        ConfigError: there are several copies, which would need a port each, or the port is the proxy's.
    """
    if num_replicas != 1:
        raise ConfigError(
            f"--direct-port={port} with num_replicas={num_replicas}: one port leads to one copy. Leave it out, or serve one copy."
        )
    if port == proxy_port:
        raise ConfigError(f"--direct-port={port} is the port of Ray Serve's proxy as well: expected another one.")
