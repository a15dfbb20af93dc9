"""How stages leave a compiled graph, also where one of them is dead or waits for what will not come."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

_logger = logging.getLogger(__name__)

_IDLE_TIMEOUT_S = 3.0
"""Seconds for a stage that computes nothing: it does not leave any more, and all wait for it."""
_TEARDOWN_TIMEOUT_S = 30.0
_POLL_S = 1.0


def leave_graph(graph: Any, actors: Sequence[Any], timeout_s: float, *, lives_on: bool) -> set[int]:
    """Have stages leave a graph, whatever is under way in it.

    Args:
        timeout_s: for those that compute.
        lives_on: they are wanted afterwards, so that one that is ended by force is worth a warning.

    Returns:
        Numbers of those that did not, and were killed.
    """
    for actor in actors:
        actor.stop_waiting.remote()
    loops = [graph.worker_task_refs[actor] for actor in actors]
    # Ray waits without end for a stage that does not leave, and has begun to by itself where one died.
    leaving = threading.Thread(target=graph.teardown, name="leave-graph", daemon=True)
    leaving.start()
    began, staying = time.monotonic(), loops
    last_work = began
    while staying and time.monotonic() < min(began + timeout_s, last_work + _IDLE_TIMEOUT_S):
        left_s = max(0.0, began + timeout_s - time.monotonic())
        _, staying = ray.wait(staying, num_returns=len(staying), timeout=min(_POLL_S, left_s), fetch_local=False)
        if _is_any_at_work([actors[index] for index, loop in enumerate(loops) if loop in staying]):
            last_work = time.monotonic()
    stuck = {index for index, loop in enumerate(loops) if loop in staying}
    for index in stuck:
        passed = time.monotonic() - began
        level = logging.WARNING if lives_on else logging.INFO
        _logger.log(level, "Stage %d did not leave the graph in %.0f s and is ended by force", index, passed)
        ray.kill(actors[index])
    leaving.join(_TEARDOWN_TIMEOUT_S)
    return stuck


def _is_any_at_work(actors: Sequence[Any]) -> bool:
    refs = [actor.is_at_work.remote() for actor in actors]
    ready, late = ray.wait(refs, num_returns=len(refs), timeout=_POLL_S) if refs else ([], [])
    for ref in ready:
        with suppress(RayError):  # of one that has died
            if ray.get(ref):
                return True
    return bool(late)  # it may be busy


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether Ray says more than that a dead stage could not be told to leave, for which it takes thirty lines."""
    return record.exc_info is None or not isinstance(record.exc_info[1], RayActorError)


logging.getLogger("ray.dag.compiled_dag_node").addFilter(_is_news)
