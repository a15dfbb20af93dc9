"""Share the GPUs of a cluster: who holds them, and a bounded wait for a share that comes whole or not at all.

Ray's placement groups are the lease: all bundles of one are granted together, so two jobs that each want four GPUs never
sit on two each and wait for the other's. What Ray does not do is said here: who holds what a job waits for, and when the
wait has been long enough.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finlora.cluster.holdings import MARK, list_holdings
from finlora.errors import NoRoomError

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

Bundle = dict[str, float]
"""Resources that lie on one node, by Ray's names: {"GPU": 1.0, "CPU": 1.0}."""

_POLL_S = 1.0
_SAY_EVERY_S = 60.0
_EPSILON = 1e-6


def describe_shortage(bundles: Sequence[Bundle]) -> str | None:
    """Return what is missing for `bundles` just now and who holds it; None where there is room.

    Room is counted over all nodes: bundles that fit no single node pass here and are still refused by Ray.
    """
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for kind in ("GPU", "CPU"):
        need = sum(bundle.get(kind, 0.0) for bundle in bundles)
        if need <= free.get(kind, 0.0) + _EPSILON:
            continue
        try:
            held = "; ".join(f"{each.amount:g} by {each.what} ({each.source})" for each in list_holdings(kind))
        except Exception as error:  # the answer comes over HTTP from the dashboard, which may be away
            held = f"by whom cannot be listed ({type(error).__name__}: {error})"
        lost = "" if need <= total.get(kind, 0.0) + _EPSILON else ", so nodes are missing"
        return (
            f"{need:g} {kind} wanted, {free.get(kind, 0.0):g} of {total.get(kind, 0.0):g} free{lost}; "
            f"held: {held or 'nothing'}"
        )
    return None


@contextmanager
def take_lease(
    bundles: Sequence[Bundle], wait_s: float | None, announce: Callable[[str], None], name: str = ""
) -> Iterator[PlacementGroup]:
    """Hold a placement group of `bundles` while inside; schedule tasks and actors into it.

    Args:
        bundles: one for each worker, stage or task.
        wait_s: seconds to wait while others hold what is needed. None: without limit.
        announce: shows the user a line, at once and then each minute, while it waits.
        name: what others are told who wait for this one.

    Raises:
        NoRoomError: the wait was too long; says who holds what.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    # Ray refuses a second group of one name.
    own = f"{name}{MARK}{secrets.token_hex(4)}" if name else ""
    group = placement_group(list(bundles), strategy="PACK", name=own)
    patience = Patience(wait_s, announce)
    try:
        with _counting():
            while not group.wait(_POLL_S):
                patience.check(describe_shortage(bundles) or f"{len(bundles)} bundles wanted that no node has room for")
        yield group
    finally:
        remove_placement_group(group)


_waited = 0.0


def seconds_waited() -> float:
    """Return how long this process has waited in `take_lease` so far, all times together."""
    return _waited


@contextmanager
def _counting() -> Iterator[None]:
    global _waited  # what measures a piece of work does not know who waits below it
    started = time.monotonic()
    try:
        yield
    finally:
        _waited += time.monotonic() - started


class Patience:
    """How long a wait goes on, and when the user hears of it.

    Args:
        wait_s: seconds from the first check. None: without limit.
        announce: shows a line.
    """

    def __init__(self, wait_s: float | None, announce: Callable[[str], None]) -> None:
        self._wait_s = wait_s
        self._announce = announce
        self._started = time.monotonic()
        self._next_word = 0.0

    def check(self, shortage: str) -> None:
        """Say what is waited for, once a minute.

        Raises:
            NoRoomError: the wait was too long.
        """
        now = time.monotonic()
        waited = now - self._started
        if self._wait_s is not None and waited >= self._wait_s:
            raise NoRoomError(
                f"{shortage}. Waited {waited:.0f} s (max_wait_s={self._wait_s:g}): stop one of them (`ray job stop ID`, "
                "a service by `serve shutdown`), ask for fewer GPUs or CPUs, or wait longer with a larger max_wait_s."
            )
        if now >= self._next_word:
            self._next_word = now + _SAY_EVERY_S
            limit = "" if self._wait_s is None else f" of at most {self._wait_s:.0f} s"
            self._announce(
                f"Waiting, {waited:.0f} s{limit}: {shortage}. End one of them, or ask for fewer GPUs or CPUs."
            )


def wait_for_room(bundles: Sequence[Bundle], patience: Patience, look: Callable[[], None] = lambda: None) -> None:
    """Return when the cluster has room for `bundles`, without taking it.

    Args:
        bundles: what is needed.
        patience: bounds the wait and announces it.
        look: called each second meanwhile; ends the wait by raising.

    Raises:
        NoRoomError: the wait was too long; says who holds what.
    """
    while (shortage := describe_shortage(bundles)) is not None:
        look()
        patience.check(shortage)
        time.sleep(_POLL_S)
