"""Links between the stages of a compiled graph: made when stages join, taken down when they leave, also where one is dead."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from finlora.config import Transport
from finlora.pipeline.actor import StageActor
from finlora.pipeline.hidden_states import find_free_address
from finlora.pipeline.sampled_tokens import Address, FirstEnd, LastEnd, Loop

_logger = logging.getLogger(__name__)


def join_stages(actors: Sequence[Any], transport: Transport, ticket: int) -> bool:
    """Prepare loaded stages for messages that pass through them in their order.

    Args:
        ticket: greater than those of all messages before, and less than those to come.

    Returns:
        Whether an answer comes only behind the next message (finlora/pipeline/late_read.py).

    Raises:
        RayError: a stage died meanwhile.
        ResourceError: the last stage cannot reach the first one.
    """
    machines: list[str | None] = ray.get(
        [actor.take_number.remote(index, len(actors)) for index, actor in enumerate(actors)]
    )
    gives_back = _join_ends(actors, machines)
    if transport == "messages":
        is_late = _share_memory(actors, machines, ticket) and gives_back
        if is_late:
            ray.get(actors[-1].__ray_call__.remote(_read_late))
        return is_late
    address = ray.get(actors[0].__ray_call__.remote(_offer_address))
    ray.get([actor.join.remote(transport, index, len(actors), address) for index, actor in enumerate(actors)])
    return False


def _join_ends(actors: Sequence[Any], machines: Sequence[str | None]) -> bool:
    """Let drawn tokens go back from the last stage to the first; returns whether that is past the host."""
    first, last = actors[0].__ray_call__, actors[-1].__ray_call__
    if len(actors) == 1:
        ray.get(first.remote(_keep_tokens))
        return False
    if machines[0] is not None and machines[0] == machines[-1]:
        reason = _find_reason(first.remote(_take_board, last.remote(_offer_board)))
        if reason is None:
            return True
        _warn(0, len(actors) - 1, "drawn tokens", reason)
    address = ray.get(first.remote(_listen))
    ray.get([first.remote(_accept), last.remote(_reach, address)])
    return False


def _share_memory(actors: Sequence[Any], machines: Sequence[str | None], ticket: int) -> bool:
    """Have stages of one machine leave hidden states on their GPUs, if a trial arrives; elsewhere they are within the messages.

    Returns:
        Whether all of them do.
    """
    num_sharing = 0
    for index, (actor, following) in enumerate(pairwise(actors)):
        if machines[index] is None or machines[index] != machines[index + 1]:
            continue
        reason = _find_reason(following.accept.remote(actor.offer.remote(ticket), ticket))
        if reason is None:
            num_sharing += 1
            continue
        _warn(index, index + 1, "hidden states", reason)
        ray.get(actor.use_messages.remote())
    return num_sharing == len(actors) - 1


def _find_reason(ref: Any) -> str | None:
    """Return in words why one stage cannot have another's memory, None if it can."""
    try:
        ray.get(ref)
    except RuntimeError as error:  # of CUDA, in either of them
        return str(error).strip().splitlines()[-1]
    return None


def _warn(one: int, other: int, what: str, reason: str) -> None:
    _logger.warning(
        "Stages %d and %d do not reach each other's GPU memory (%s): their %s pass through the host, which takes longer. In "
        "containers they need one IPC namespace, on two GPUs direct access (nvidia-smi topo -p2p r).",
        *(one, other, reason, what),
    )


# What follows runs where a stage is.


def _offer_address(_stage: StageActor) -> str:
    """Return an address on which the stages can meet."""
    return find_free_address(ray.util.get_node_ip_address())


def _read_late(stage: StageActor) -> None:
    stage.reader.is_late = True


def _keep_tokens(stage: StageActor) -> None:
    stage.coming = stage.going = Loop()


def _offer_board(stage: StageActor) -> bytes:
    from finlora.pipeline.sampled_tokens_gpu import LastBoard

    stage.board = stage.board or LastBoard(stage.device)
    stage.going = stage.board
    return stage.board.handle


def _take_board(stage: StageActor, handle: bytes) -> None:
    from finlora.pipeline.sampled_tokens_gpu import FirstBoard

    stage.coming = FirstBoard(handle, stage.device)


def _listen(stage: StageActor) -> Address:
    stage.coming = end = FirstEnd(ray.util.get_node_ip_address())
    return end.address


def _accept(stage: StageActor) -> None:
    assert isinstance(stage.coming, FirstEnd)
    stage.coming.accept()


def _reach(stage: StageActor, address: Address) -> None:
    stage.going = LastEnd(address)


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
