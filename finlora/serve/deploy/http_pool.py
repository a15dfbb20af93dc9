"""HTTP processes at a replica's direct port, as Ray actors on the replica's node. Ray restarts one that crashes."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from finlora.errors import ResourceError
from finlora.serve.accounts.prometheus import Measures
from finlora.serve.deploy.http_process import DRAIN_S, answer_http
from finlora.serve.settings import ServeConfig, read_settings, to_args

_logger = logging.getLogger(__name__)
_MAX_FAILURES = 10
"""Health checks in a row that find a process ended. After them Ray Serve restarts the whole replica."""
_FORM = "%(levelname)s %(asctime)s %(name)s -- %(message)s"


class HttpProcess:
    """Ray actor with one HTTP process."""

    def __init__(self, args: dict[str, Any], hub: str, metrics: str | None) -> None:
        # Ray writes each actor's stderr to its own log file.
        logging.basicConfig(stream=sys.stderr, format=_FORM)
        logging.getLogger("finlora").setLevel(logging.INFO)
        self._config, self._hub, self._metrics = read_settings(args), Path(hub), metrics
        self._opened, self._closing = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Answer requests until `close`."""
        await answer_http(self._config, self._hub, Measures(), self._opened, self._closing, self._metrics)

    async def wait_until_open(self) -> None:
        """Return when the port answers."""
        await self._opened.wait()

    async def close(self) -> None:
        """Refuse new connections, and let `run` end after the answers in flight."""
        self._closing.set()


class HttpPool:
    """Pool of a replica's HTTP processes.

    Args:
        hub: socket of the engine's hub.
        metrics: address of Ray's metrics on this node.

    Raises:
        ConfigError: the certificate cannot be used.
        ResourceError: the port is taken.
    """

    def __init__(self, config: ServeConfig, hub: Path, metrics: str | None = None) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # They reserve no core, like Ray Serve's own proxy.
        actor = ray.remote(HttpProcess).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
        )
        self._actors = [actor.remote(to_args(config), str(hub), metrics) for _ in range(config.direct.processes)]
        self._runs = [each.run.remote() for each in self._actors]
        self._num_failures = [0] * len(self._runs)
        waits = [each.wait_until_open.remote() for each in self._actors]
        try:
            while waits:
                (done, *_), _ = ray.wait([*self._runs, *waits])
                if done in self._runs:
                    ray.get(done)  # raises the error of a process that failed
                    raise ResourceError(
                        f"nothing answers at direct.port={config.direct.port}: see the log of HttpProcess."
                    )
                waits.remove(done)
        except BaseException:
            self.close(0.0)
            raise

    def check(self) -> None:
        """Restart processes that ended with an error. Ray itself restarts those that crashed.

        Raises:
            RuntimeError: one had ended at each of the last `_MAX_FAILURES` health checks.
        """
        for index, run in enumerate(self._runs):
            if not ray.wait([run], timeout=0)[0]:
                self._num_failures[index] = 0
                continue
            self._num_failures[index] += 1
            if self._num_failures[index] >= _MAX_FAILURES:
                raise RuntimeError(
                    f"a process of the direct port ended {_MAX_FAILURES} times: see the log of HttpProcess"
                )
            _logger.error("A process of the direct port ended and restarts: %s", _why(run))
            self._runs[index] = self._actors[index].run.remote()

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Let answers in flight end for `drain_s` seconds, then kill the processes."""
        for each in self._actors:
            each.close.remote()
        ray.wait(self._runs, num_returns=len(self._runs), timeout=drain_s)
        for each in self._actors:
            ray.kill(each)


def _why(run: Any) -> str:
    try:
        ray.get(run)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "it lost its link to the engine"
