"""Room for the workers of a run: waited for before each start of them, with words for the user, and not for ever.

Ray Train asks for all its workers in one placement group, which comes whole or not at all, but it asks silently and without
end. This callback runs in its controller, right before each such request. What it has to say goes through a file of the run
folder, since a controller's prints reach no user.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback

from finlora.cluster.holdings import note_title
from finlora.cluster.lease import Bundle, Patience, wait_for_room
from finlora.train.run.progress import clear_step
from finlora.train.run.run_folder import RunFolder
from finlora.train.run.stop import describe_stop


class AwaitRoom(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Holds back the request for workers until the cluster has room for them.

    Ray Train passes on callbacks of its internal kinds as well as the public ones; this hook exists among them alone.

    Args:
        folder: the run's.
        bundles: resources of each worker.
        wait_s: seconds to wait at the start, and again after a failure. None: without limit.
    """

    def __init__(self, folder: RunFolder, bundles: list[Bundle], wait_s: float | None) -> None:
        self._folder = folder
        self._bundles = bundles
        self._wait_s = wait_s
        self._patience: Patience | None = None

    def on_controller_start_worker_group(self, *, scaling_config: Any, num_workers: int) -> None:
        """Wait.

        Raises:
            ResourceError: for too long; says who holds what.
            StoppedError: the user stopped the run meanwhile.
        """
        # Another job may be faster when room comes up; then Ray Train tries again and the wait goes on where it was.
        self._patience = self._patience or Patience(self._wait_s, self._say)
        clear_step(self._folder)
        wait_for_room(self._bundles, self._patience, self._look)
        self._folder.waiting.unlink(missing_ok=True)

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Begin the next wait, if there is one, afresh; write down which placement group the workers are in."""
        self._patience = None
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        self._folder.group.write_text(group.id.hex(), encoding="utf-8")
        note_title(group.id.hex(), self._folder.title)

    def _say(self, line: str) -> None:
        with self._folder.waiting.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    def _look(self) -> None:
        """Make what room can be made, and see whether the run is still wanted."""
        self._folder.waiting.touch()  # its being there is what the driver counts as waiting, also between two words
        free_orphans()
        if self._folder.stop.read_bytes().strip():
            raise describe_stop(self._folder.stop, 0, 0)


def free_group(folder: RunFolder) -> None:
    """Remove the placement group of a run whose driver was ended from outside, as a search ends the trials that lag.

    Ray Train has a helper of its own for that, which finds no cluster where a machine runs several, and gives up. Nothing is
    done while the driver lives: its workers would be started again.
    """
    from ray import PlacementGroupID
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    if not folder.group.is_file():
        return
    with folder.lock.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:
            pass  # a file system without locks
    group = PlacementGroupID(bytes.fromhex(folder.group.read_text(encoding="utf-8")))
    remove_placement_group(PlacementGroup(group))
    folder.group.unlink()


def free_orphans() -> list[str]:
    """Remove the placement groups of this job whose creator, a controller or a trial, is dead; returns their ids.

    Ray keeps a group until the job ends that created it, a whole search here. A run's group is known to `free_group` once its
    workers have started, and to nobody where the trial is killed before that: the next try would wait for it for ever.
    """
    import ray
    from ray.core.generated.gcs_pb2 import PlacementGroupTableData
    from ray.util.placement_group import PlacementGroup, remove_placement_group

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    # Who created a group is in Ray's table alone: placement_group_table() leaves it out.
    accessor = ray._private.state.state._connect_and_get_accessor()
    freed = []
    for raw in accessor.get_placement_group_table():
        facts = PlacementGroupTableData.FromString(raw)
        is_by_actor = not ray.ActorID(facts.creator_actor_id).is_nil()  # a driver's own counts as one of a dead actor
        is_there = facts.state != PlacementGroupTableData.REMOVED and not facts.is_detached
        if is_there and is_by_actor and facts.creator_actor_dead and facts.creator_job_id == job:
            group = ray.PlacementGroupID(facts.placement_group_id)
            remove_placement_group(PlacementGroup(group))
            freed.append(group.hex())
    return freed


class WaitingWords:
    """The driver's side: shows each line that the callback has written since the last look, and tells whether it waits."""

    def __init__(self, path: Path, announce: Callable[[str], None]) -> None:
        self._path = path
        self._announce = announce
        self._shown = 0
        path.unlink(missing_ok=True)

    @property
    def is_waiting(self) -> bool:
        return self._path.exists()

    def show_new(self) -> None:
        """Look once."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            self._shown = 0
            return
        whole = text[: text.rfind("\n") + 1]
        for line in whole[self._shown :].splitlines():
            self._announce(line)
        self._shown = len(whole)
