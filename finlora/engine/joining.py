"""How neighbouring stages of a pipeline come to hand each other hidden states."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import ray

from finlora.config import Transport
from finlora.engine.stage_actor import StageActor
from finlora.engine.transport import find_free_address

_logger = logging.getLogger(__name__)


def join_stages(actors: Sequence[Any], transport: Transport) -> None:
    """Prepare loaded stages for messages that pass through them in their order.

    Raises:
        RayError: a stage died meanwhile.
        ResourceError: the last stage cannot reach the first one.
    """
    _join_ends(actors)
    if transport == "messages":
        _share_gpus(actors)
        return
    address = ray.get(actors[0].__ray_call__.remote(_offer_address))
    ray.get([actor.join.remote(transport, index, len(actors), address) for index, actor in enumerate(actors)])


def _join_ends(actors: Sequence[Any]) -> None:
    """Let drawn tokens go back from the last stage to the first."""
    first, last = actors[0], actors[-1]
    if len(actors) == 1:
        ray.get(first.keep_tokens.remote())
        return
    address = ray.get(first.__ray_call__.remote(lambda stage: stage.listen(ray.util.get_node_ip_address())))
    ray.get([first.accept_last.remote(), last.reach_first.remote(address)])


def _share_gpus(actors: Sequence[Any]) -> None:
    """Have stages that follow each other on one GPU leave hidden states there; elsewhere they travel within the messages."""
    gpus: list[str | None] = ray.get(
        [actor.take_number.remote(index, len(actors)) for index, actor in enumerate(actors)]
    )
    for index, (actor, following) in enumerate(pairwise(actors)):
        if gpus[index] is None or gpus[index] != gpus[index + 1]:
            continue
        reason: str | None = ray.get(following.accept.remote(actor.offer.remote()))
        if reason is not None:
            _logger.warning(
                "Stages %d and %d share a GPU but not its memory (%s): their hidden states pass through the host, which takes "
                "longer. In containers they need one IPC and PID namespace.",
                *(index, index + 1, reason),
            )
            ray.get(actor.use_messages.remote())


def _offer_address(_stage: StageActor) -> str:
    """Return an address on which the stages can meet; runs where the first one is."""
    return find_free_address(ray.util.get_node_ip_address())
