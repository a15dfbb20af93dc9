"""How neighbouring stages of a pipeline come to hand each other hidden states, and the last one tokens to the first."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import ray

from finlora.config import Transport
from finlora.engine.feedback import Address, FirstEnd, LastEnd, Loop
from finlora.engine.stage_actor import StageActor
from finlora.engine.transport import find_free_address

_logger = logging.getLogger(__name__)


def join_stages(actors: Sequence[Any], transport: Transport) -> None:
    """Prepare loaded stages for messages that pass through them in their order.

    Raises:
        RayError: a stage died meanwhile.
        ResourceError: the last stage cannot reach the first one.
    """
    gpus: list[str | None] = ray.get(
        [actor.take_number.remote(index, len(actors)) for index, actor in enumerate(actors)]
    )
    _join_ends(actors, gpus)
    if transport == "messages":
        _share_gpus(actors, gpus)
        return
    address = ray.get(actors[0].__ray_call__.remote(_offer_address))
    ray.get([actor.join.remote(transport, index, len(actors), address) for index, actor in enumerate(actors)])


def _join_ends(actors: Sequence[Any], gpus: Sequence[str | None]) -> None:
    """Let drawn tokens go back from the last stage to the first."""
    first, last = actors[0].__ray_call__, actors[-1].__ray_call__
    if len(actors) == 1:
        ray.get(first.remote(_keep_tokens))
        return
    if gpus[0] is not None and gpus[0] == gpus[-1]:
        reason = _find_reason(first.remote(_take_board, last.remote(_offer_board)))
        if reason is None:
            return
        _warn(0, len(actors) - 1, "drawn tokens", reason)
    address = ray.get(first.remote(_listen))
    ray.get([first.remote(_accept), last.remote(_reach, address)])


def _share_gpus(actors: Sequence[Any], gpus: Sequence[str | None]) -> None:
    """Have stages that follow each other on one GPU leave hidden states there; elsewhere they travel within the messages."""
    for index, (actor, following) in enumerate(pairwise(actors)):
        if gpus[index] is None or gpus[index] != gpus[index + 1]:
            continue
        reason = _find_reason(following.accept.remote(actor.offer.remote()))
        if reason is not None:
            _warn(index, index + 1, "hidden states", reason)
            ray.get(actor.use_messages.remote())


def _find_reason(ref: Any) -> str | None:
    """Return in words why one stage cannot have another's memory, None if it can."""
    try:
        ray.get(ref)
    except RuntimeError as error:  # of CUDA, in either of them
        return str(error).strip().splitlines()[-1]
    return None


def _warn(one: int, other: int, what: str, reason: str) -> None:
    _logger.warning(
        "Stages %d and %d share a GPU but not its memory (%s): their %s pass through the host, which takes longer. In containers "
        "they need one IPC namespace.",
        *(one, other, reason, what),
    )


# What follows runs where a stage is.


def _offer_address(_stage: StageActor) -> str:
    """Return an address on which the stages can meet."""
    return find_free_address(ray.util.get_node_ip_address())


def _keep_tokens(stage: StageActor) -> None:
    stage.coming = stage.going = Loop()


def _offer_board(stage: StageActor) -> bytes:
    from finlora.engine.board import LastBoard

    stage.board = stage.board or LastBoard(stage.device)
    stage.going = stage.board
    return stage.board.handle


def _take_board(stage: StageActor, handle: bytes) -> None:
    from finlora.engine.board import FirstBoard

    stage.coming = FirstBoard(handle, stage.device)


def _listen(stage: StageActor) -> Address:
    stage.coming = end = FirstEnd(ray.util.get_node_ip_address())
    return end.address


def _accept(stage: StageActor) -> None:
    assert isinstance(stage.coming, FirstEnd)
    stage.coming.accept()


def _reach(stage: StageActor, address: Address) -> None:
    stage.going = LastEnd(address)
