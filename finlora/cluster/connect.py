"""Connection to a Ray cluster, or to a local one that it starts with a token of its own; tasks with reserved resources."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from finlora.cluster.lease import take_lease
from finlora.cluster.probe import probe_cluster, require_node_here, require_same_versions
from finlora.errors import ConfigError, FinloraError, ResourceError
from finlora.machine.cpu import set_environment, worker_environment
from finlora.machine.host import check_ray_temp, find_ray_temp, require_free_port
from finlora.machine.signals import hold_sigterm, without_hangup_for_children

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_TOKEN_FILE = Path("~/.config/finlora/ray-token")
_NICENESS = "RAY_worker_niceness"
"""Read by each process of Ray when it starts. Ray lowers its workers' priority by 15 by default, which leaves them 3 % of a core
that a program of usual priority wants too: beside two busy loops on two cores a training had not started after two minutes."""


def prepare() -> None:
    """Check that a local Ray can start, and set the token and the workers' priority. Call it before any import of Ray.

    Raises:
        ConfigError: the token cannot be stored in the home folder.
        ResourceError: the temporary folder cannot hold Ray's files.
    """
    if is_local():
        check_ray_temp()
        _guard_local()
        os.environ.setdefault(_NICENESS, "0")


def connect(log_to_driver: bool, metrics_port: int | None = None) -> None:
    """Connect to the cluster of RAY_ADDRESS or of the running job; start a local one otherwise.

    The dashboard and address of a local one are on the loopback interface; Ray's other ports listen on all interfaces
    (docs/explanation/security.md). It requires a token of FinLoRA's own. Ray's default token file is not used, since it would
    change how other Ray programs of this user behave.

    Args:
        log_to_driver: show the workers' output.
        metrics_port: port of Ray's metrics on a local Ray. None: a free one.

    Raises:
        ConfigError: RAY_ADDRESS is not the address of a cluster, or the home folder cannot hold the token.
        ResourceError: no cluster answers at RAY_ADDRESS within 15 s, its versions or token differ, or a local one cannot start.
    """
    prepare()
    set_environment()  # a local Ray inherits it
    import ray  # only now: Ray reads its authentication mode on import
    from ray._private import auto_init_hook

    # Otherwise a thread that still asks Ray for something while this process ends starts a second one.
    auto_init_hook.enable_auto_connect = False
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS", "").strip()
    if not is_local():
        versions = probe_cluster(address)
        require_same_versions(versions)
        require_node_here(versions)
    try:
        if not is_local():
            with hold_sigterm() as is_held, _without_sigterm_of_ray(is_held):
                ray.init(log_to_driver=log_to_driver, runtime_env={"env_vars": worker_environment()})
            return
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # no cloud takes this machine alone back
        with without_hangup_for_children(), hold_sigterm() as is_held, _without_sigterm_of_ray(is_held):
            ray.init(
                address="local",
                log_to_driver=log_to_driver,
                _node_ip_address="127.0.0.1",
                logging_level="WARNING",
                _metrics_export_port=metrics_port,
            )
    except Exception as error:  # Ray raises many types here
        raise _explain_start(error, address) from error


@contextlib.contextmanager
def _without_sigterm_of_ray(is_held: bool) -> Iterator[None]:
    """Keep Ray's handlers of SIGTERM out of this process while it joins.

    The native one prints a stack and aborts with 134. Its constant replaces RAY_DISABLE_FAILURE_SIGNAL_HANDLER, which Ray's
    workers would inherit, and lose the stack of their crashes; Python's faulthandler still shows a real crash. Python's one
    exits with 15.

    Args:
        is_held: SIGTERM is held back, so that Ray's Python handler is not needed.
    """
    from ray._private import ray_constants, utils

    native, setter = ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER, utils.set_sigterm_handler
    ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER = True
    if is_held:
        utils.set_sigterm_handler = lambda _handler: None
    try:
        yield
    finally:
        ray_constants.RAY_DISABLE_FAILURE_SIGNAL_HANDLER, utils.set_sigterm_handler = native, setter


def require_local_metrics(metrics_port: int | None) -> None:
    """Check that a wanted port of metrics can be had: only the start of a Ray sets it.

    Raises:
        ConfigError: the server runs on a cluster.
        ResourceError: the port is taken.
    """
    if metrics_port is None:
        return
    if not is_local():
        raise ConfigError(
            f"metrics_port={metrics_port} holds only for a Ray that `finlora serve` starts: on a cluster leave it out, and "
            "give the port to `ray start --metrics-export-port`."
        )
    require_free_port("127.0.0.1", metrics_port, "metrics_port")


def is_local() -> bool:
    """Return whether `connect` starts a Ray on this machine alone."""
    return os.environ.get("RAY_ADDRESS", "").strip() in ("", "local")


def find_metrics_address() -> str | None:
    """Return where Prometheus reads the metrics of this node without a key; None: Ray exports none here."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()
    for node in nodes:
        if node["NodeID"] == own and node.get("MetricsExportPort"):
            return f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return None


def find_node_address() -> str:
    """Return the address at which other nodes of the cluster reach this one."""
    import ray

    return str(ray.util.get_node_ip_address())


def _explain_start(error: Exception, address: str) -> ResourceError:
    found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not is_local():
        return ResourceError(
            f"the Ray cluster at RAY_ADDRESS={address} answers, but cannot be joined ({found}): look at `ray status` there, and "
            "start this machine's node again (`ray stop`, `ray start`)."
        )
    if "timed out during startup" in str(error):
        return ResourceError(
            "Ray did not start on this machine within 30 s, its own limit: other work takes the processors. Run the same "
            "command again when they are free, or name a cluster that runs with RAY_ADDRESS."
        )
    return ResourceError(
        f"Ray did not start on this machine ({found}): its logs are in {find_ray_temp() / 'ray' / 'session_latest' / 'logs'}; "
        "`finlora doctor` looks for what is missing."
    )


def count_gpus() -> float:
    """Return the GPUs of the connected cluster, used or free."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0.0))


def require(num_workers: int, cpus: float, gpus: float) -> None:
    """Check that the whole cluster is large enough for the workers, before a wait that could not end.

    Args:
        num_workers: workers at the same time.
        cpus: CPU cores per worker.
        gpus: GPUs per worker.

    Raises:
        ResourceError: it is too small; names what it has in total, what is free, and what was requested.
    """
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for kind, each in (("GPU", gpus), ("CPU", cpus)):
        need = num_workers * each
        if need > total.get(kind, 0.0) + 1e-6:
            remedy = (
                "choose fewer workers, or the CPU with train.device=cpu eval.device=cpu"
                if kind == "GPU"
                else "choose fewer workers or lower train.cpus_per_worker"
            )
            raise ResourceError(
                f"the config asks for {need:g} {kind} ({num_workers} workers x {each:g}), but the cluster has "
                f"{total.get(kind, 0.0):g} ({free.get(kind, 0.0):g} free now): {remedy}."
            )


def call(
    function: Callable[..., _T],
    *arguments: object,
    num_cpus: float,
    num_gpus: float,
    wait_s: float | None = None,
    announce: Callable[[str], None] = _logger.warning,
    title: str | None = None,
) -> _T:
    """Run a function as a Ray task with reserved CPU cores and GPUs; re-raises a FinloraError as it was raised.

    Args:
        function: to run in the task.
        arguments: of the function.
        num_cpus: CPU cores.
        num_gpus: GPUs, or a share of one.
        wait_s: most seconds to wait while others hold them. None: no limit.
        announce: shows a line with the holders during the wait.
        title: shown as the holder to others who wait. None: the function's name.

    Raises:
        ResourceError: the cluster is too small, or the wait was too long.
    """
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    require(1, num_cpus, num_gpus)
    name = title or str(getattr(function, "__name__", "task"))
    bundle = {"CPU": num_cpus} | ({"GPU": num_gpus} if num_gpus else {})
    with take_lease([bundle], wait_s, announce, name=name) as group:
        options = {"scheduling_strategy": PlacementGroupSchedulingStrategy(placement_group=group), "max_retries": 0}
        task = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, **options)(function)
        try:
            return cast(_T, ray.get(task.remote(*arguments)))
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FinloraError):
                raise error.cause from error
            raise


def _guard_local() -> None:
    if "RAY_AUTH_MODE" in os.environ:
        return
    token_file = _TOKEN_FILE.expanduser()
    try:
        _make_token(token_file)
    except OSError as error:
        raise ConfigError(
            f"the token of a local Ray cannot be kept at {token_file} ({error.strerror}): make the home folder writable, or set "
            "HOME to one that is."
        ) from error
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)


def _make_token(token_file: Path) -> None:
    if token_file.is_file():
        with token_file.open("rb"):  # raises if it is not readable
            return
    token_file.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name first: a process killed here must not leave an empty token, which Ray would always refuse.
    descriptor, fresh = tempfile.mkstemp(prefix=".ray-token-", dir=token_file.parent)
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
    with contextlib.suppress(FileExistsError):  # another process was first
        os.link(fresh, token_file)
    Path(fresh).unlink()
