"""The processes at a server's own port as Ray actors of its replica, on the replica's node; Ray starts one again that dies."""

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
"""Looks in a row, one each few seconds, at which a process had ended; then the whole copy is started anew."""
_FORM = "%(levelname)s %(asctime)s %(name)s -- %(message)s"


class FrontActor:
    """One process."""

    def __init__(self, args: dict[str, Any], hub: str) -> None:
        # Ray keeps what a process writes to stderr in a log of its own.
        logging.basicConfig(stream=sys.stderr, format=_FORM)
        logging.getLogger("finlora").setLevel(logging.INFO)
        self._config, self._hub = read_settings(args), Path(hub)
        self._opened, self._closing = asyncio.Event(), asyncio.Event()

    async def run(self) -> None:
        """Answer until `close`."""
        await answer_http(self._config, self._hub, Measures(), self._opened, self._closing)

    async def wait_until_open(self) -> None:
        """Return when the port answers."""
        await self._opened.wait()

    async def close(self) -> None:
        """Take no more connections, and have `run` end when the answers under way have."""
        self._closing.set()


class Fronts:
    """All processes at the port of one replica, in which this is called.

    Args:
        hub: socket at which the engine is asked.

    Raises:
        ConfigError: the certificate cannot be used.
        ResourceError: the port is taken by others.
    """

    def __init__(self, config: ServeConfig, hub: Path) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # As Ray Serve's own proxy they reserve no core: what a machine has left for HTTP is theirs.
        actor = ray.remote(FrontActor).options(
            num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here
        )
        self._actors = [actor.remote(to_args(config), str(hub)) for _ in range(config.direct.processes)]
        self._runs = [each.run.remote() for each in self._actors]
        self._num_failures = [0] * len(self._runs)
        waits = [each.wait_until_open.remote() for each in self._actors]
        try:
            while waits:
                (done, *_), _ = ray.wait([*self._runs, *waits])
                if done in self._runs:
                    ray.get(done)  # raises what ended it
                    raise ResourceError(
                        f"nothing answers at direct.port={config.direct.port}: see the log of FrontActor."
                    )
                waits.remove(done)
        except BaseException:
            self.close(0.0)
            raise

    def check(self) -> None:
        """Have processes that ended with an error begin again; Ray does so with those that died.

        Raises:
            RuntimeError: one ended at this and the last looks.
        """
        for index, run in enumerate(self._runs):
            if not ray.wait([run], timeout=0)[0]:
                self._num_failures[index] = 0
                continue
            self._num_failures[index] += 1
            if self._num_failures[index] >= _MAX_FAILURES:
                raise RuntimeError(
                    f"a process of the direct port ended {_MAX_FAILURES} times: see the log of FrontActor"
                )
            _logger.error("A process of the direct port ended and begins again: %s", _why(run))
            self._runs[index] = self._actors[index].run.remote()

    def close(self, drain_s: float = DRAIN_S) -> None:
        """Let answers under way end, for so many seconds, and then the processes."""
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
