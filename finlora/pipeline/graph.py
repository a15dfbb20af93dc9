"""Links and teardown of a compiled graph of stages, also of one with dead or blocked stages."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError

from finlora.config import Transport
from finlora.pipeline.transports import (
    HiddenStateChoice,
    HiddenStateTransport,
    TokenChoice,
    TokenTransport,
    choose_hidden_state_links,
    choose_token_link,
)

_logger = logging.getLogger(__name__)
_T = TypeVar("_T")


def join_stages(actors: Sequence[Any], transport: Transport, ticket: int) -> bool:
    """Join loaded stages by links, before messages pass through them in their order.

    Args:
        ticket: greater than those of all messages before, and less than those to come.

    Returns:
        Whether an answer comes only behind the next message (finlora/pipeline/late_read.py).

    Raises:
        RayError: a stage crashed meanwhile.
        ResourceError: the last stage cannot reach the first one.
    """
    numbers = range(len(actors))
    machines: list[str | None] = ray.get([actors[index].take_number.remote(index, len(actors)) for index in numbers])
    run_ahead = [_join_tokens(actors, choose_token_link(machines))]
    run_ahead += [
        _join_hidden_states(actors, choice, ticket) for choice in choose_hidden_state_links(transport, machines)
    ]
    is_late = all(run_ahead)
    if is_late:
        ray.get(actors[-1].read_late.remote())
    return is_late


def _join_tokens(actors: Sequence[Any], choice: TokenChoice) -> bool:
    """Join the first stage and the last; returns whether the first one's GPU waits for the tokens, and no host."""
    ends = [actors[index] for index in choice.stages]

    def join(transport: TokenTransport) -> list[Any]:
        offers = [end.offer_tokens.remote(transport) for end in ends]
        return [end.join_tokens.remote(transport, offer) for end, offer in zip(ends, reversed(offers), strict=True)]

    return _join_by_first(choice.transports, join, choice.stages, "sampled tokens")


def _join_hidden_states(actors: Sequence[Any], choice: HiddenStateChoice, ticket: int) -> bool:
    """Join consecutive stages; returns whether messages run ahead of what is computed."""
    members = [actors[index] for index in choice.stages]

    def join(transport: HiddenStateTransport) -> list[Any]:
        offer = members[0].offer_hidden_states.remote(transport, ticket)
        return [
            member.join_hidden_states.remote(transport, offer, rank, len(members))
            for rank, member in enumerate(members)
        ]

    return _join_by_first(choice.transports, join, choice.stages, "hidden states")


def _join_by_first(transports: Sequence[_T], join: Callable[[_T], list[Any]], stages: Sequence[int], what: str) -> bool:
    """Join stages by the first transport that connects them; returns whether messages run ahead on it."""
    for transport in transports[:-1]:
        try:
            return bool(ray.get(join(transport))[-1])
        except RuntimeError as error:  # of CUDA, in one of them
            _warn(stages[0], stages[-1], what, str(error).strip().splitlines()[-1])
    return bool(ray.get(join(transports[-1]))[-1])


def _warn(one: int, other: int, what: str, reason: str) -> None:
    _logger.warning(
        "Stages %d and %d do not reach each other's GPU memory (%s): their %s pass through the host, which takes longer. In "
        "containers they need one IPC namespace, on two GPUs direct access (nvidia-smi topo -p2p r).",
        *(one, other, reason, what),
    )


_IDLE_TIMEOUT_S = 3.0
"""Seconds until an idle stage is killed: it is blocked, and the others wait for it."""
_TEARDOWN_TIMEOUT_S = 30.0
_POLL_S = 1.0


def leave_graph(graph: Any, actors: Sequence[Any], timeout_s: float, *, keeps_stages: bool) -> set[int]:
    """Tear down a graph with messages in flight.

    Args:
        timeout_s: for stages that compute.
        keeps_stages: the stages are used again, so that killing one is worth a warning.

    Returns:
        Numbers of the stages that did not leave and were killed.
    """
    for actor in actors:
        actor.stop_waiting.remote()
    loops = [graph.worker_task_refs[actor] for actor in actors]
    # In a thread: Ray waits without limit for a stage that does not leave. After a crash it already does.
    leaving = threading.Thread(target=graph.teardown, name="leave-graph", daemon=True)
    leaving.start()
    began, staying = time.monotonic(), loops
    last_work = began
    while staying and time.monotonic() < min(began + timeout_s, last_work + _IDLE_TIMEOUT_S):
        left_s = max(0.0, began + timeout_s - time.monotonic())
        _, staying = ray.wait(staying, num_returns=len(staying), timeout=min(_POLL_S, left_s), fetch_local=False)
        if _is_any_computing([actors[index] for index, loop in enumerate(loops) if loop in staying]):
            last_work = time.monotonic()
    stuck = {index for index, loop in enumerate(loops) if loop in staying}
    for index in stuck:
        passed = time.monotonic() - began
        level = logging.WARNING if keeps_stages else logging.INFO
        _logger.log(level, "Stage %d did not leave the graph in %.0f s and is ended by force", index, passed)
        ray.kill(actors[index])
    leaving.join(_TEARDOWN_TIMEOUT_S)
    return stuck


def _is_any_computing(actors: Sequence[Any]) -> bool:
    refs = [actor.is_computing.remote() for actor in actors]
    ready, late = ray.wait(refs, num_returns=len(refs), timeout=_POLL_S) if refs else ([], [])
    for ref in ready:
        with suppress(RayError):  # of a dead stage
            if ray.get(ref):
                return True
    return bool(late)  # the stage may be busy


def _is_news(record: logging.LogRecord) -> bool:
    """Return whether a log record is more than the thirty-line traceback of a dead stage that cannot be cancelled."""
    return record.exc_info is None or not isinstance(record.exc_info[1], RayActorError)


logging.getLogger("ray.dag.compiled_dag_node").addFilter(_is_news)
