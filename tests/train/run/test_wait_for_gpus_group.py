"""Placement groups of killed drivers are removed, and no others."""

from __future__ import annotations

import fcntl
import time

import pytest

from finlora.train.run.run_folder import RunFolder, claim_run

pytestmark = pytest.mark.ray


def test_group_of_a_dead_driver_is_removed(ray_instance, tmp_path):
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    from finlora.train.run.wait_for_gpus import free_group

    folder = RunFolder(tmp_path)
    free_group(folder)  # no worker has started yet
    group = placement_group([{"CPU": 0.5}])
    ray.get(group.ready())
    folder.group.write_text(group.id.hex())
    with claim_run(folder):
        free_group(folder)
        assert placement_group_table(group)["state"] == "CREATED"
    free_group(folder)
    ended = time.monotonic() + 30
    while placement_group_table(group)["state"] != "REMOVED" and time.monotonic() < ended:
        time.sleep(0.1)
    assert placement_group_table(group)["state"] == "REMOVED"
    assert not folder.group.exists()
    folder.group.write_text(group.id.hex())
    free_group(folder)  # a second call has no effect, as after a run that removed its group
    with (tmp_path / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the check itself keeps no lock


def test_group_of_a_dead_actor_is_removed_and_no_other(ray_instance):
    import ray
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    from finlora.train.run.wait_for_gpus import free_orphans

    @ray.remote(num_cpus=0)
    class Holder:
        def take(self):
            self.group = placement_group([{"CPU": 0.1}])
            ray.get(self.group.ready())
            return self.group

    def state_of(group):
        return placement_group_table(group)["state"]

    own = placement_group([{"CPU": 0.1}])
    ray.get(own.ready())
    living, dead = Holder.remote(), Holder.remote()
    groups = ray.get([living.take.remote(), dead.take.remote()])
    assert free_orphans() == []
    ray.kill(dead)
    ended, freed = time.monotonic() + 30, []
    while not freed and time.monotonic() < ended:
        freed = free_orphans()
        time.sleep(0.1)
    assert freed == [groups[1].id.hex()]
    while state_of(groups[1]) != "REMOVED" and time.monotonic() < ended:
        time.sleep(0.1)
    assert [state_of(group) for group in (own, *groups)] == ["CREATED", "CREATED", "REMOVED"]
    for group in (own, groups[0]):
        remove_placement_group(group)
    ray.kill(living)
