"""Reach a Ray cluster, or start a local one that asks for a token of its own, and check what it can give."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, cast

from finlora.cpu import worker_environment
from finlora.errors import FinloraError, ResourceError
from finlora.lease import take_lease

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")

_TOKEN_FILE = Path("~/.config/finlora/ray-token")


def connect(log_to_driver: bool) -> None:
    """Join the cluster of RAY_ADDRESS or the running job; start a local one otherwise.

    Its dashboard and its own address are on the loopback interface; other ports of Ray listen on all of the machine's
    (docs/security.md). It is guarded by a token of FinLoRA's own, never by one in Ray's default place, since that file would
    change how other Ray programs of this user behave.

    Args:
        log_to_driver: show what workers print.

    Raises:
        ResourceError: RAY_ADDRESS is set but no cluster answers there.
    """
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        _guard_local()
    import ray  # only now: Ray reads its authentication mode when it is imported

    if ray.is_initialized():
        return
    try:
        if address:
            ray.init(log_to_driver=log_to_driver, runtime_env={"env_vars": worker_environment()})
        else:
            ray.init(
                address="local",
                log_to_driver=log_to_driver,
                _node_ip_address="127.0.0.1",
                logging_level="WARNING",
            )
    except ConnectionError as error:
        raise ResourceError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({error}): start one (`ray start --head`), mend the address or the "
            "token (RAY_AUTH_MODE, RAY_AUTH_TOKEN_PATH), or unset RAY_ADDRESS to run on this machine alone."
        ) from error
    except Exception as error:  # Ray has no kind of its own for it
        if "timed out during startup" not in str(error):
            raise
        raise ResourceError(
            "Ray did not start on this machine within 30 s, its own limit: other work takes the processors. Run the same "
            "command again when they are free, or name a cluster that runs with RAY_ADDRESS."
        ) from error


def require(num_workers: int, cpus: float, gpus: float) -> None:
    """Check that the cluster could ever hold the workers, instead of waiting for what cannot come.

    Args:
        num_workers: workers wanted at once.
        cpus: CPU cores a worker.
        gpus: GPUs a worker.

    Raises:
        ResourceError: says what the cluster has in all, what is free, and what was asked for.
    """
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for kind, each in (("GPU", gpus), ("CPU", cpus)):
        need = num_workers * each
        if need > total.get(kind, 0.0) + 1e-6:
            mend = (
                "choose fewer workers, or the CPU with train.device=cpu eval.device=cpu"
                if kind == "GPU"
                else "choose fewer workers or lower train.cpus_per_worker"
            )
            raise ResourceError(
                f"the config asks for {need:g} {kind} ({num_workers} workers x {each:g}), but the cluster has "
                f"{total.get(kind, 0.0):g} ({free.get(kind, 0.0):g} free now): {mend}."
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
    """Run a function as a Ray task with reserved CPU cores and GPUs; an error of ours comes back as it was raised.

    Args:
        function: what to run.
        arguments: what it takes.
        num_cpus: CPU cores.
        num_gpus: GPUs, or a share of one.
        wait_s: seconds to wait while others hold them. None: without limit.
        announce: shows a line while it waits, which says who holds them.
        title: what others read who wait for what it holds. None: the function's name.

    Raises:
        ResourceError: the cluster could never hold it, or the wait was too long.
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
    if not token_file.is_file():
        token_file.parent.mkdir(parents=True, exist_ok=True)
        # Under another name first: a process that is killed here must not leave an empty token, which Ray refuses for good.
        descriptor, fresh = tempfile.mkstemp(prefix=".ray-token-", dir=token_file.parent)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(fresh, token_file)
        Path(fresh).unlink()
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_file)
