"""Probe of RAY_ADDRESS within 15 s: nothing there, not a cluster, another version, another token."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from concurrent import futures

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

from finlora.cluster import connect, probe
from finlora.errors import ConfigError, ResourceError

OWN_PYTHON = ".".join(map(str, __import__("sys").version_info[:3]))


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    """Tests of other files set token mode before Ray is imported."""
    monkeypatch.setattr("ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: False)


class ControlStore(gcs_service_pb2_grpc.InternalKVGcsServiceServicer):
    """The part of Ray's control store that a probe queries; `refusal` replaces its answer."""

    def __init__(self):
        self.value = {"ray_version": ray.__version__, "python_version": OWN_PYTHON}
        self.refusal = None

    def InternalKVGet(self, request, context):  # noqa: N802
        assert (request.key, request.namespace) == (b"CLUSTER_METADATA", b"cluster")
        if self.refusal is not None:
            context.abort(self.refusal, "no")
        return gcs_service_pb2.InternalKVGetReply(value=json.dumps(self.value).encode())


@pytest.fixture
def store(monkeypatch):
    """A control store at `store.address`, which RAY_ADDRESS names."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    made = ControlStore()
    gcs_service_pb2_grpc.add_InternalKVGcsServiceServicer_to_server(made, server)
    made.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    server.start()
    yield made
    server.stop(None)


def test_versions_of_a_cluster_are_read(store):
    found = probe.probe_cluster(store.address)
    assert (found.address, found.ray, found.python) == (store.address, ray.__version__, OWN_PYTHON)
    probe.require_same_versions(found)


@pytest.mark.parametrize(("key", "version"), [("ray_version", "2.9.3"), ("python_version", "3.10.1")])
def test_other_version_is_named_beside_ours(store, key, version):
    store.value[key] = version
    with pytest.raises(ResourceError) as error:
        probe.require_same_versions(probe.probe_cluster(store.address))
    there = store.value
    assert str(error.value) == (
        f"the Ray cluster at {store.address} runs Ray {there['ray_version']} on Python {there['python_version']}, and this "
        f"environment has Ray {ray.__version__} on Python {OWN_PYTHON}: expected the same on all machines. Start the cluster "
        "from this environment, use the cluster's, or unset RAY_ADDRESS to run on this machine alone."
    )


def test_patch_release_of_python_may_differ_if_ray_is_set_so(store, monkeypatch):
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    store.value["python_version"] = "3.11.0"
    probe.require_same_versions(probe.probe_cluster(store.address))


def test_machine_without_a_node_is_advised_to_submit_a_job(monkeypatch):
    monkeypatch.setattr("ray._private.services.find_node_ids", set)
    versions = probe.ClusterVersions(address="h:6379", ray="1", python="3")
    with pytest.raises(ResourceError, match=r"answers at h:6379, but this machine is not a node of it.*ray job submit"):
        probe.require_node_here(versions)


def test_refused_token_names_what_was_sent(store, monkeypatch):
    store.refusal = grpc.StatusCode.UNAUTHENTICATED
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with pytest.raises(
        ResourceError, match=r"asks for its token \(.*RAY_AUTH_MODE=not set, so no token is sent\): set"
    ):
        probe.probe_cluster(store.address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/somewhere/token")
    with pytest.raises(ResourceError, match=r"refuses the token; RAY_AUTH_MODE=token with /somewhere/token"):
        probe.probe_cluster(store.address)


def test_cluster_that_is_still_starting_is_reported(store):
    store.value = {}
    with pytest.raises(ResourceError, match=r"does not say its version: wait until `ray start --head` has come up"):
        probe.probe_cluster(store.address)


def test_listener_that_never_answers_times_out(monkeypatch):
    monkeypatch.setattr(probe, "ANSWER_S", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(ResourceError, match=r"something listens there and gave no answer within 0.5 s"):
            probe.probe_cluster(f"127.0.0.1:{silent.getsockname()[1]}")


def test_other_server_is_no_cluster():
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ResourceError, match=r"does not speak Ray's protocol.*not the dashboard's 8265"):
            probe.probe_cluster(f"127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        (
            "127.0.0.1:1",
            ResourceError,
            r"no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 \(Connection refused\): expected",
        ),
        ("nosuch.invalid:6379", ResourceError, r"\(the name nosuch.invalid cannot be resolved\)"),
        ("http://head:8265", ConfigError, r"is a dashboard's address: expected HOST:PORT"),
        ("ray://head:10001", ConfigError, r"is Ray Client's address: expected HOST:PORT"),
        ("head", ConfigError, r"RAY_ADDRESS=head is not an address: expected HOST:PORT"),
        ("head:99999", ConfigError, r"RAY_ADDRESS=head:99999 is not an address"),
    ],
)
def test_address_of_no_cluster_is_refused(monkeypatch, address, kind, words):
    """By `connect`, before Ray's client starts its ten minutes of retries."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(kind, match=words):
        connect.connect(log_to_driver=False)


def test_auto_without_a_cluster_is_refused(monkeypatch):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", frozenset)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _folder: None)
    with pytest.raises(ResourceError, match=r"RAY_ADDRESS=auto finds no Ray cluster on this machine"):
        probe.probe_cluster("auto")
