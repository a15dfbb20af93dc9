"""Serve YAMLs of serve_configs/: read and checked with Ray Serve's own schema, and run on one machine by `finlora serve`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from finlora.cluster.connect import find_metrics_address
from finlora.configfile import describes_server
from finlora.errors import ConfigError, ResourceError
from finlora.machine.foreign_errors import shorten
from finlora.machine.host import require_free_port
from finlora.machine.signals import handled_signals, leave_terminal
from finlora.model.base_files import BaseFiles
from finlora.precision import describe_type, resolve_model
from finlora.serve.accounts.keys import KeyRing
from finlora.serve.adapter_versions import AdapterShelf
from finlora.serve.deploy.direct_port import check_certificate, require_free
from finlora.serve.deploy.start_up import StartUpDoor, set_proxy_replies
from finlora.serve.served_model import read_base
from finlora.serve.settings import ServeConfig, make_absolute, read_settings, to_args
from finlora.yamltext import read_yaml

_logger = logging.getLogger(__name__)
IMPORT_PATH = "finlora.serve.deploy.replica:build"
_END_S = 30.0
"""Seconds in which Ray Serve must end; serve.shutdown has the same limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployment:
    """FinLoRA's application in a Serve YAML."""

    name: str
    route_prefix: str
    settings: ServeConfig
    options: dict[str, Any]
    """Options of Ray Serve's deployment, such as num_replicas."""
    http: dict[str, Any]
    logging: dict[str, Any]
    """Logging options of Ray Serve itself."""
    proxy_location: str


def read_deployment(path: Path, overrides: Sequence[str] = ()) -> Deployment:
    """Read a Serve YAML; `overrides` such as `stages.num=4` change its `args`.

    Raises:
        ConfigError: it is not a Serve YAML, its settings are wrong, or it holds other applications than FinLoRA's.
    """
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    try:
        tree = read_yaml(path)
        if not describes_server(tree):
            raise ConfigError(
                f"{path} describes no served model: expected a Serve YAML with `applications:`, as in serve_configs/."
            )
        schema = ServeDeploySchema.model_validate(tree)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist: see serve_configs/ for one YAML a deployment.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): expected a YAML as in serve_configs/.") from error
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise ConfigError([f"{path}: {fault}" for fault in faults]) from error
    ours = [application for application in schema.applications if application.import_path == IMPORT_PATH]
    if len(ours) != 1 or len(schema.applications) != 1:
        found = ", ".join(application.import_path for application in schema.applications) or "none"
        raise ConfigError(
            f"{path} holds applications with these import paths: {found}. Expected one application, with "
            f"`import_path: {IMPORT_PATH}`, as in serve_configs/ (before 0.1.0 it was finlora.serve.app:build)."
        )
    (application,) = ours
    options = (
        application.deployments[0].model_dump(exclude_unset=True, exclude={"name"}) if application.deployments else {}
    )
    return Deployment(
        name=application.name,
        route_prefix=application.route_prefix or "/",
        settings=read_settings(application.args, overrides),
        options=options,
        http=schema.http_options.model_dump(exclude_unset=True),
        logging=schema.logging_config.model_dump(exclude_unset=True) if schema.logging_config else {},
        proxy_location=str(schema.proxy_location.value),
    )


def resolve_http(deployment: Deployment, host: str | None, port: int | None) -> dict[str, Any]:
    """Return the options of the proxy: host and port as given, else the YAML's, else 127.0.0.1 and 8000."""
    http: dict[str, Any] = {"host": "127.0.0.1", "port": 8000} | deployment.http
    return http | {key: value for key, value in (("host", host), ("port", port)) if value is not None}


def open_start_up(deployment: Deployment, host: str | None, port: int | None) -> StartUpDoor:
    """Answer 503 at the proxy's address from now on, until `run_server` has the proxy there.

    Raises:
        ConfigError: the proxy's certificate cannot be used.
        ResourceError: the port is taken.
    """
    http = resolve_http(deployment, host, port)
    _require_free_proxy(http)
    set_proxy_replies(deployment.options)
    try:
        return StartUpDoor(http)
    except ssl.SSLError as error:
        raise ConfigError(
            f"http_options.ssl_certfile={http['ssl_certfile']} cannot be used ({error}): expected a certificate and its key, PEM."
        ) from error
    except OSError as error:
        raise ResourceError(f"port={http['port']} at {http['host']} cannot be opened ({error}).") from error


def check_server(
    deployment: Deployment, host: str | None, port: int | None, *, is_here: bool, files: BaseFiles | None = None
) -> Deployment:
    """Check all that needs no GPU and no cluster: ports, certificate, keys, base, tokenizer.

    Args:
        host: address of the proxy. None: the YAML's, or 127.0.0.1.
        port: port of the proxy. None: the YAML's, or 8000.
        is_here: whether the proxy will run on this machine, so that its port must be free here.
        files: of the base, if this process has found and checked them already. None: it does so here.

    Returns:
        The deployment with absolute paths and the proxy's address.

    Raises:
        ConfigError: there is no key, or the direct port's settings conflict with the proxy's.
        ModelError: the base's files are not usable.
        ResourceError: a port is taken.
    """
    http = resolve_http(deployment, host, port)
    settings = make_absolute(_follow_proxy(deployment.settings, http))
    if is_here:
        _require_free_proxy(http)
    if settings.direct.port is not None:
        check_certificate(settings.direct)
        require_free(settings.direct)
    KeyRing(settings.keys_path, os.environ)
    if settings.adapters_folder is not None and settings.adapters_folder.is_file():
        raise ConfigError(f"adapters_dir={settings.adapters_folder} is a file: expected the folder of adapters.")
    base = read_base(settings, files)
    shelf = AdapterShelf.of(settings, base)
    for reason in shelf.describe_unserved():
        _logger.warning("Not served: %s", reason)
    if base.doubt:
        _logger.warning("model.base=%s: %s.", settings.model.base, base.doubt)
    shelf.log_notices()
    return dataclasses.replace(deployment, settings=settings, http=http)


def run_server(deployment: Deployment, announce: Callable[[str], None], door: StartUpDoor | None = None) -> None:
    """Serve on the connected Ray until a signal comes, then finish the answers in flight.

    Args:
        deployment: returned by `check_server`.
        door: listens at the proxy's port; closed once the proxy does.

    Raises:
        ResourceError: another service runs on the cluster, a port is taken, or the server did not start; says why.
    """
    import ray
    from ray import serve
    from ray.exceptions import RayError

    from finlora.serve.deploy.replica import ServerDeployment

    http, settings, direct = deployment.http, deployment.settings, deployment.settings.direct
    kind = describe_type(settings.model, settings.stages.device)
    settings = dataclasses.replace(settings, model=resolve_model(settings.model, settings.stages.device))
    require_no_service()
    require_capacity(deployment, ray.cluster_resources())
    if door is None and _is_head():
        _require_free_proxy(http)  # Ray's own processes may have taken the port meanwhile
    # At INFO, Ray Serve reports each of its steps and claims, wrongly, that the deployment's options are not applied.
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    stop = threading.Event()

    def end(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        stop.set()

    previous = {number: signal.signal(number, end) for number in handled_signals()}
    try:
        remote: Any = ServerDeployment
        try:
            serve.start(http_options=http, proxy_location=deployment.proxy_location)
            if door is not None:
                door.close()
            application = remote.options(**deployment.options).bind(to_args(settings))
            route = {"name": deployment.name, "route_prefix": deployment.route_prefix}
            serve.run(application, **route, logging_config=deployment.logging or None)
        except (RuntimeError, RayError) as error:
            raise ResourceError(
                f"the server did not start: {shorten(error)}. `ray status` and the logs in the dashboard say more."
            ) from error
        where = _name(http.get("ssl_certfile"), http["host"], http["port"])
        beside = (
            f", and directly at {_name(direct.ssl_certfile, direct.host, direct.port)}"
            if direct.port is not None
            else ""
        )
        if settings.adapters_folder is not None and not settings.adapters_folder.is_dir():
            announce(f"adapters_dir={settings.adapters_folder} does not exist: only the base is served until it does.")
        announce(f"Serving {settings.name} at {where} (page, /v1/...){beside}, in {kind}. Ctrl-C ends it.")
        announce(describe_ports())
        stop.wait()
        announce("Finishing the answers in flight.")
        try:
            serve.delete(deployment.name)  # serve.shutdown alone would cut them off after half a minute
        except TimeoutError:
            announce("Answers that are not complete after a minute are cut off.")
    finally:
        _end_controller()
        serve.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)


def describe_ports() -> str:
    """Return where Ray's dashboard and the metrics of this node are."""
    import ray

    address = find_metrics_address()
    metrics = f"Metrics for Prometheus at {address}, without a key" if address else "No metrics"
    dashboard = ray._private.worker.get_dashboard_url()
    return f"{metrics}{f'; Ray dashboard at http://{dashboard}' if dashboard else ''}."


def count_stages(deployment: Deployment) -> int:
    """Return the number of stages in all replicas; with autoscaling, in the replicas at the start."""
    scaling = deployment.options.get("autoscaling_config") or {}
    copies = deployment.options.get("num_replicas") or 1
    if not isinstance(copies, int):  # `auto`
        copies = scaling.get("min_replicas", 1)
    return deployment.settings.stages.num * int(copies)


def require_capacity(deployment: Deployment, total: Mapping[str, float]) -> None:
    """Check that the whole cluster has enough GPUs and cores for all stages, instead of waiting forever.

    Args:
        total: resources of the cluster by Ray's names.

    Raises:
        ResourceError: the cluster is too small.
    """
    stages, count = deployment.settings.stages, count_stages(deployment)
    for kind, each in (("GPU", stages.gpus if stages.device == "cuda" else 0.0), ("CPU", stages.cpus)):
        if count * each > total.get(kind, 0.0) + 1e-6:
            advice = "or stages.device=cpu" if kind == "GPU" else "or a lower stages.cpus"
            raise ResourceError(
                f"the server asks for {count * each:g} {kind} ({count} stages of all copies x {each:g}), and the cluster has "
                f"{total.get(kind, 0.0):g}: choose fewer stages.num or num_replicas, {advice}."
            )


def _require_free_proxy(http: dict[str, Any]) -> None:
    require_free_port(http["host"], http["port"], "port")


def _is_head() -> bool:
    import ray

    own = ray.get_runtime_context().get_node_id()
    return any(node["NodeID"] == own and "node:__internal_head__" in node["Resources"] for node in ray.nodes())


def require_no_service() -> None:
    """Refuse a cluster on which Ray Serve runs: `finlora serve` would shut that service down when it ends."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    with contextlib.suppress(ValueError):
        ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        raise ResourceError(
            "a Ray Serve service runs on this cluster already: update it with `serve deploy FILE`, end it with `serve shutdown`, "
            "or unset RAY_ADDRESS to serve on this machine alone."
        )


def _end_controller() -> None:
    """Shut Ray Serve down through its controller, as serve.shutdown does, but without its error on the terminal.

    The controller ends itself instead of answering the call. serve.shutdown makes this call with retries, and for a call with
    retries Ray prints the lost actor as an error. Without retries the call only raises RayActorError here.
    """
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return  # Ray Serve did not start
    # After any other failure the caller's serve.shutdown tries again and reports it.
    with contextlib.suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        ray.get(controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=_END_S)


def _follow_proxy(settings: ServeConfig, http: dict[str, Any]) -> ServeConfig:
    """Return the settings whose direct port uses the proxy's address and certificate, unless it has its own.

    Raises:
        ConfigError: both ports are equal, or the direct port cannot use the proxy's TLS settings.
    """
    direct = settings.direct
    if direct.port is None:
        return settings
    if direct.port == http["port"]:
        raise ConfigError(f"direct.port={direct.port} is the port of Ray Serve's proxy too: expected another one.")
    certificate = direct.ssl_certfile, direct.ssl_keyfile
    if direct.ssl_certfile is None:
        if unknown := [name for name in ("ssl_keyfile_password", "ssl_ca_certs") if http.get(name)]:
            raise ConfigError(
                f"http_options.{unknown[0]} guards the proxy, and direct.port={direct.port} takes only a certificate and a key "
                "without a password: leave the direct port out, or give it its own direct.ssl_certfile and ssl_keyfile."
            )
        certificate = http.get("ssl_certfile"), http.get("ssl_keyfile")
    direct = dataclasses.replace(
        direct, host=direct.host or http["host"], ssl_certfile=certificate[0], ssl_keyfile=certificate[1]
    )
    return dataclasses.replace(settings, direct=direct)


def _name(certificate: str | None, host: str | None, port: int | None) -> str:
    return f"{'https' if certificate else 'http'}://{host}:{port}"
