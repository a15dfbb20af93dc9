"""Bounded wait for the GPUs and cores of a run's workers, with progress lines for the user.

Ray Train asks for all its workers in one placement group, which is granted whole or not at all. It asks silently and waits
without limit. This callback runs in its controller before each request. Its lines go through a file of the run folder, since
what a controller prints reaches no user.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from finlora.cluster.holdings import note_title
from finlora.cluster.lease import Bundle, Patience, wait_for_room
from finlora.durable import try_lock
from finlora.train.run.progress import clear_step
from finlora.train.run.run_folder import RunFolder
from finlora.train.run.stop import describe_stop


class AwaitRoom(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Callback that delays the request for workers until the cluster has room for them.

    This hook exists only among Ray Train's internal callbacks, which it accepts beside the public ones.

    Args:
        folder: of the run.
        bundles: resources of each worker.
        wait_s: longest wait in seconds, at the start and again after each failure. None: no limit.
    """

    def __init__(self, folder: RunFolder, bundles: list[Bundle], wait_s: float | None) -> None:
        self._folder = folder
        self._bundles = bundles
        self._wait_s = wait_s
        self._patience: Patience | None = None

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> None:
        """Wait for room.

        Raises:
            ResourceError: the wait is over; says who holds what.
            StoppedError: the user stopped the run meanwhile.
        """
        # Another job may take the room first: Ray Train then asks again, and this wait continues.
        self._patience = self._patience or Patience(self._wait_s, self._say)
        clear_step(self._folder)
        wait_for_room(self._bundles, self._patience, self._look)
        self._folder.waiting.unlink(missing_ok=True)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Reset the wait for the next start, and record the workers' placement group."""
        self._patience = None
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._folder.group.write_text(group.id.hex(), encoding="utf-8")
        note_title(group.id.hex(), self._folder.title)

    def _say(self, line: str) -> None:
        with self._folder.waiting.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _look(self) -> None:
        """Free groups that nobody uses, and stop where the user asked for it."""
        self._folder.waiting.touch()  # while the file exists, the driver counts the time as waiting
        free_orphans()
        if self._folder.stop.read_bytes().strip():
            raise describe_stop(self._folder.stop, 0, 0)


def free_group(folder: RunFolder) -> None:
    """Remove the placement group of a run whose driver was killed, as ASHA's pruning does.

    Ray Train's own helper for that finds no cluster on a machine with several. While the driver lives nothing is removed: it
    would start its workers again.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if not folder.group.is_file():
        return
    with folder.lock.open("a") as stream:
        if not try_lock(stream):
            return
    group = PlacementGroupID(bytes.fromhex(folder.group.read_text(encoding="utf-8")))
    remove_placement_group(PlacementGroup(group))
    folder.group.unlink()


def free_orphans() -> list[str]:
    """Remove the placement groups of this job whose creator, a controller or a trial, is dead; returns their ids.

    Ray keeps a group until the job that created it ends, here a whole search. `free_group` knows a run's group only after its
    workers have started. A trial that is killed earlier leaves a group for which the next attempt would wait without end.
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    # Only this table names a group's creator; placement_group_table() leaves it out.
    accessor = ray._private.state.state._connect_and_get_accessor()
    freed = []
    for raw in accessor.get_placement_group_table():
        facts = PlacementGroupTableData.FromString(raw)
        is_by_actor = not ray.ActorID(
            facts.creator_actor_id
        ).is_nil()  # a group of the driver itself is marked as one of a dead actor
        is_there = facts.state != PlacementGroupTableData.REMOVED and not facts.is_detached
        if is_there and is_by_actor and facts.creator_actor_dead and facts.creator_job_id == job:
            group = ray.PlacementGroupID(facts.placement_group_id)
            remove_placement_group(PlacementGroup(group))
            freed.append(group.hex())
    return freed


class WaitingWords:
    """Driver's side of the wait: shows new lines of the callback, and tells whether it waits."""

    def __init__(self, path: Path, announce: Callable[[str], None]) -> None:
        self._path = path
        self._announce = announce
        self._shown = 0
        path.unlink(missing_ok=True)

    @property
    def is_waiting(self) -> bool:
        return self._path.exists()

    def show_new(self) -> None:
        """Show the lines written since the last call."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self._shown = 0
            return
        whole = text[: text.rfind("\n") + 1]
        for line in whole[self._shown :].splitlines():
            self._announce(line)
        self._shown = len(whole)
