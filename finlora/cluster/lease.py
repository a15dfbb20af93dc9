"""Lease of cluster resources: a Ray placement group with a bounded wait, and the names of those who hold what is missing.

All bundles of a placement group are granted together, so two jobs that each want four GPUs never hold two each and wait for the
other's. Ray bounds no wait and names no holder: this module does.
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
    """Return what is missing for `bundles` now and who holds it; None: they fit.

    Resources are summed over all nodes: bundles that fit no single node pass here and are refused by Ray.
    """
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for kind in ("GPU", "CPU"):
        need = sum(bundle.get(kind, 0.0) for bundle in bundles)
        if need <= free.get(kind, 0.0) + _EPSILON:
            continue
        try:
            held = "; ".join(f"{each.amount:g} by {each.what} ({each.source})" for each in list_holdings(kind))
        except Exception as error:  # it asks the dashboard by HTTP, which may not answer
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
    """Placement group of `bundles`, held while inside, for tasks and actors to be scheduled into.

    Args:
        bundles: one for each worker, stage or task.
        wait_s: most seconds to wait while others hold the resources. None: no limit.
        announce: shows the user a line at the start of the wait and each minute after.
        name: shown as the holder to others who wait.

    Raises:
        NoRoomError: the wait was too long; names the holders.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    # Ray refuses a second group with the same name.
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
    """Return the seconds that this process has waited in `take_lease` so far."""
    return _waited


@contextmanager
def _counting() -> Iterator[None]:
    global _waited  # callers that time a piece of work do not see the waits inside it
    started = time.monotonic()
    try:
        yield
    finally:
        _waited += time.monotonic() - started


class Patience:
    """Time limit of a wait, and its progress lines.

    Args:
        wait_s: most seconds to wait. None: no limit.
        announce: shows a line.
    """

    def __init__(self, wait_s: float | None, announce: Callable[[str], None]) -> None:
        self._wait_s = wait_s
        self._announce = announce
        self._started = time.monotonic()
        self._next_word = 0.0

    def check(self, shortage: str) -> None:
        """Announce the shortage, once a minute.

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
    """Wait until the cluster has free resources for `bundles`, without taking them.

    Args:
        bundles: resources that are needed.
        patience: limits and announces the wait.
        look: called each second; raises to end the wait.

    Raises:
        NoRoomError: the wait was too long; names the holders.
    """
    while (shortage := describe_shortage(bundles)) is not None:
        look()
        patience.check(shortage)
        time.sleep(_POLL_S)
