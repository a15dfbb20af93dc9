"""Check of a running Ray cluster before this process joins it: address, token, versions, node on this machine.

Ray's own client tries an address for ten minutes, and reports a version mismatch as a traceback. Here one call of the cluster's
control store (GCS) with a deadline finds out what is wrong.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from finlora.errors import ConfigError, FinloraError, ResourceError
from finlora.machine.host import require_listener

RESOLVE_S, CONNECT_S, ANSWER_S = 4.0, 4.0, 6.0
"""Timeouts of name resolution, connection and answer in seconds: 14 in total."""
_EXPECTED = "expected HOST:PORT of a `ray start --head` (port 6379 unless told otherwise)"
_ALONE = "or unset RAY_ADDRESS to run on this machine alone"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterVersions:
    """Versions of Ray and Python with which a cluster was started."""

    address: str
    """HOST:PORT of its control store."""
    ray: str
    python: str


def probe_cluster(address: str) -> ClusterVersions:
    """Ask the cluster at an address for its versions, within 15 s.

    Args:
        address: as in RAY_ADDRESS: HOST:PORT, or `auto` for a cluster that runs on this machine.

    Raises:
        ConfigError: it is not the address of a cluster, but of its dashboard or of Ray Client.
        ResourceError: nothing answers there, or not a cluster, or the cluster refuses the token.
    """
    host, port = _read_address(address)
    try:
        require_listener(host, port, RESOLVE_S, CONNECT_S)
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error.strerror}): {_EXPECTED}. Start one, change the address, "
            f"{_ALONE}."
        ) from error
    return _ask_versions(address, f"{host}:{port}" if ":" not in host else f"[{host}]:{port}")


def require_same_versions(cluster: ClusterVersions) -> None:
    """Compare the cluster's Ray and Python versions with this process's, by Ray's own rule.

    Raises:
        ResourceError: they differ; names both.
    """
    import ray
    from ray._private.utils import check_version_info, compute_version_info

    found = {"ray_version": cluster.ray, "python_version": cluster.python}
    try:
        check_version_info(found, "this machine")
    except RuntimeError:
        own = compute_version_info()
        raise ResourceError(
            f"the Ray cluster at {cluster.address} runs Ray {cluster.ray} on Python {cluster.python}, and this environment has "
            f"Ray {ray.__version__} on Python {own[1]}: expected the same on all machines. Start the cluster from this "
            f"environment, use the cluster's, {_ALONE}."
        ) from None


def require_node_here(cluster: ClusterVersions) -> None:
    """Check that a Ray node runs on this machine: a driver joins a cluster through one.

    Raises:
        ResourceError: there is none.
    """
    from ray._private.services import find_node_ids

    if not find_node_ids():
        raise ResourceError(
            f"a Ray cluster answers at {cluster.address}, but this machine is not a node of it, and a command runs on a node: "
            f"submit it as a job (`ray job submit --address http://HEAD:8265 ...`), join with "
            f"`ray start --address={cluster.address}`, {_ALONE}."
        )


def _read_address(address: str) -> tuple[str, int]:
    if address == "auto":
        from ray._private.services import canonicalize_bootstrap_address

        try:
            # With RAY_ADDRESS=auto Ray looks for a cluster of this machine.
            found = canonicalize_bootstrap_address("auto")
        except ConnectionError:
            found = None
        if not found:
            raise ResourceError(
                f"RAY_ADDRESS=auto finds no Ray cluster on this machine: start one (`ray start --head`), {_ALONE}."
            )
        address = found
    if "://" in address:
        kind = {"ray": "Ray Client's address", "http": "a dashboard's address", "https": "a dashboard's address"}
        scheme = address.partition("://")[0]
        raise ConfigError(
            f"RAY_ADDRESS={address} is {kind.get(scheme, 'no address of a cluster')}: {_EXPECTED}. To send a command to a "
            "dashboard, use `ray job submit --address http://HEAD:8265 ...`."
        )
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"RAY_ADDRESS={address} is not an address: {_EXPECTED}, {_ALONE}.")
    return host, int(port)


def _ask_versions(address: str, target: str) -> ClusterVersions:
    import grpc
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.grpc_utils import init_grpc_channel
    from ray._private.ray_constants import KV_NAMESPACE_CLUSTER
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import RayError

    try:
        channel = init_grpc_channel(target, [("grpc.enable_http_proxy", 0)])
    except (OSError, RuntimeError, ValueError) as error:  # RAY_USE_TLS without its files
        raise ConfigError(f"RAY_USE_TLS cannot be followed ({error}): expected the files of RAY_TLS_*.") from error
    request = gcs_service_pb2.InternalKVGetRequest(key=CLUSTER_METADATA_KEY, namespace=KV_NAMESPACE_CLUSTER)
    try:
        stub = gcs_service_pb2_grpc.InternalKVGcsServiceStub(channel)
        reply = stub.InternalKVGet(request, timeout=ANSWER_S)
        values = json.loads(reply.value)
        return ClusterVersions(address=target, ray=values["ray_version"], python=values["python_version"])
    except grpc.RpcError as error:
        raise _explain(address, error) from error
    except (RayError, RuntimeError) as error:  # of reading the token
        found = str(error).splitlines()[0].partition(". ")[0]
        raise _explain_token(address, f"the token cannot be read: {found}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResourceError(
            f"the Ray cluster at RAY_ADDRESS={address} does not say its version: wait until `ray start --head` has come up, "
            "or start it again."
        ) from error
    finally:
        channel.close()


def _explain(address: str, error: Any) -> FinloraError:
    import grpc

    code = error.code()
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return _explain_token(address, "the cluster refuses the token")
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        found = f"something listens there and gave no answer within {ANSWER_S:g} s"
    else:
        found = f"what listens there does not speak Ray's protocol, {code.name}"
    return ResourceError(
        f"no Ray cluster answers at RAY_ADDRESS={address} ({found}): {_EXPECTED}, not the dashboard's 8265. Change the address, "
        f"{_ALONE}."
    )


def _explain_token(address: str, found: str) -> ResourceError:
    mode = os.environ.get("RAY_AUTH_MODE")
    source = os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token"
    sent = (
        f"RAY_AUTH_MODE={mode or 'not set'}, so no token is sent"
        if mode != "token"
        else f"RAY_AUTH_MODE=token with {'RAY_AUTH_TOKEN' if os.environ.get('RAY_AUTH_TOKEN') else source}"
    )
    return ResourceError(
        f"the Ray cluster at RAY_ADDRESS={address} asks for its token ({found}; {sent}): set RAY_AUTH_MODE=token and "
        f"RAY_AUTH_TOKEN_PATH to the file that the cluster was started with, {_ALONE}."
    )
