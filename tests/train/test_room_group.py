"""The placement group of a run whose driver was ended is given back, and only then."""

from __future__ import annotations

import fcntl
import time

import pytest

from finlora.train.run import RunFolder, claim_run

pytestmark = pytest.mark.ray


def test_group_of_a_dead_driver_is_removed(ray_instance, tmp_path):
    import ray
    from ray.util.placement_group import placement_group, placement_group_table

    from finlora.train.room import free_group

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
    free_group(folder)  # once more does no harm, as after a run that removed its own
    with (tmp_path / "lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the look itself keeps no lock
