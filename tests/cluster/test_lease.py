"""Leases of cluster resources: names of holders, bounded waits, and all-or-nothing groups."""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from contextlib import ExitStack

import pytest

from finlora.cluster import connect
from finlora.cluster.holdings import list_holdings, note_title
from finlora.cluster.lease import Patience, describe_shortage, take_lease, wait_for_room
from finlora.errors import ResourceError

pytestmark = pytest.mark.ray


def ignore(_line):
    """Discard a line."""


@pytest.fixture
def half(ray_instance):
    """Half of the cluster's cores: two such shares fit, three do not."""
    import ray

    return ray.cluster_resources()["CPU"] / 2


def test_shortage_names_group_actor_task_and_job(half):
    import ray

    class Reader:
        def ready(self):
            return True

    with take_lease([{"CPU": half}], 30.0, ignore, name="tune-of-anna"):
        actor = ray.remote(num_cpus=half / 2)(Reader).options(name="reader-of-otto").remote()
        ray.get(actor.ready.remote())
        sleeper = ray.remote(num_cpus=half / 4)(lambda: time.sleep(60)).options(name="sleeper").remote()
        deadline = time.monotonic() + 30
        while len(list_holdings("CPU")) < 3:
            assert time.monotonic() < deadline, list_holdings("CPU")
            time.sleep(0.5)
        found = {holding.what: holding.amount for holding in list_holdings("CPU")}
        assert found == {"tune-of-anna": half, "reader-of-otto": half / 2, "sleeper": half / 4}
        said = describe_shortage([{"CPU": half}])
        assert f"{half:g} CPU wanted, {half / 4:g} of {2 * half:g} free; held: {half:g} by tune-of-anna (job " in said
        assert re.search(rf"process {os.getpid()} on \S+: \S*python", said)
        ray.cancel(sleeper, force=True)
        ray.kill(actor)


def test_group_that_ray_created_for_a_training_has_the_trainings_name(half):
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    group = placement_group([{"CPU": half}])
    try:
        ray.get(group.ready())
        deadline = time.monotonic() + 30
        while (found := [holding.what for holding in list_holdings("CPU")]) != ["an empty placement group"]:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        note_title(group.id.hex(), "the training llama-8b-fpb")
        assert [holding.what for holding in list_holdings("CPU")] == ["the training llama-8b-fpb"]
    finally:
        remove_placement_group(group)


def test_wait_for_resources_of_another_job_ends_and_names_it(half):
    lines = []
    with (
        take_lease([{"CPU": 2 * half}], 30.0, ignore, name="serve-70b"),
        pytest.raises(
            ResourceError, match=r"held: .* by serve-70b \(job .*Waited \d+ s \(max_wait_s=4\): stop one of them"
        ),
        take_lease([{"CPU": half}, {"CPU": half}], 4.0, lines.append),
    ):
        pass
    assert [line.partition(" ")[0] for line in lines] == ["Waiting,"]
    assert " s of at most 4 s: " in lines[0]


def test_jobs_that_want_all_cores_take_turns_instead_of_a_part_each(half):
    """Each wants all cores in two bundles; bundles granted one by one would deadlock."""
    spans = []

    def take_turn():
        with take_lease([{"CPU": half}, {"CPU": half}], 60.0, ignore, name="one name for all"):
            begin = time.monotonic()
            time.sleep(1.0)
            spans.append((begin, time.monotonic()))

    threads = [threading.Thread(target=take_turn) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    spans.sort()
    assert len(spans) == 3
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))


def test_wait_for_room_takes_nothing(half):
    with take_lease([{"CPU": half}], 30.0, ignore):
        wait_for_room([{"CPU": half}], Patience(20.0, ignore))
        with pytest.raises(ResourceError, match="wait longer with a larger max_wait_s"):
            wait_for_room([{"CPU": 2 * half}], Patience(1.0, ignore))
    wait_for_room([{"CPU": 2 * half}], Patience(20.0, ignore))


def test_shortage_beyond_the_cluster_says_that_nodes_are_missing(half):
    assert "8 GPU wanted, 0 of 0 free, so nodes are missing; held: nothing" in describe_shortage([{"GPU": 8.0}])


def test_task_waits_its_turn_and_then_runs(half):
    lines = []
    with ExitStack() as lease:
        lease.enter_context(take_lease([{"CPU": 2 * half}], 30.0, ignore, name="first"))

        def hear(line):
            lines.append(line)
            lease.close()

        assert connect.call(lambda a, b: a - b, 7, 2, num_cpus=half, num_gpus=0.0, announce=hear) == 5
    assert len(lines) == 1
    assert "held: " in lines[0]
