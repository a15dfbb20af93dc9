"""Holders of resources from Ray's records: services, trainings, searches and evaluations by name, others by command."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from finlora.cluster.holdings import Holding, collect

# As in Ray 2.60; the names of replicas are Ray Serve's.
ANNA = SimpleNamespace(
    job_id="01000000", submission_id="raysubmit_x", entrypoint="python jobs/train.py", driver_info=None
)
OTTO = SimpleNamespace(
    job_id="02000000",
    submission_id=None,
    entrypoint="python mine.py " + "y" * 200,
    driver_info=SimpleNamespace(pid="77", node_ip_address="10.0.0.5"),
)
HIDDEN = "09000000"  # the dashboard's own job, which makes the controller of `serve deploy`


def group(group_id, amount, job_id, name=""):
    bundles = [{"unit_resources": {"GPU": 1.0, "CPU": 0.5}}] * amount
    return SimpleNamespace(placement_group_id=group_id, name=name, creator_job_id=job_id, bundles=bundles)


def actor(name="", *, class_name="", namespace="other", group_id=None, job_id="02000000", **resources):
    return SimpleNamespace(
        name=name,
        class_name=class_name,
        ray_namespace=namespace,
        placement_group_id=group_id,
        job_id=job_id,
        required_resources=resources,
    )


def holders(kind, groups=(), actors=(), tasks=(), titles=None):
    return collect(kind, groups, actors, tasks, [ANNA, OTTO], titles or {})


def test_service_is_named_once_with_its_replica_and_its_stages_and_how_to_end_it():
    replica = actor("SERVE_REPLICA::finlora#Server#ab12", namespace="serve", job_id=HIDDEN, CPU=0.5)
    stages = group("g", 2, HIDDEN, "the service finlora #3f")
    inside = [actor(class_name="StageActor", group_id="g", job_id=HIDDEN, CPU=0.5, GPU=1.0) for _ in range(2)]
    held = holders("CPU", [stages], [replica, *inside])
    assert held == [Holding(amount=1.5, what="the service finlora", source="`serve shutdown` ends it")]
    assert [holding.amount for holding in holders("GPU", [stages], [replica, *inside])] == [2.0]


def test_service_that_a_job_runs_ends_with_the_job():
    replica = actor("SERVE_REPLICA::finlora#Server#ab12", namespace="serve", job_id="01000000", CPU=0.5)
    (held,) = holders("CPU", actors=[replica])
    assert held.source == "job raysubmit_x: python jobs/train.py"


@pytest.mark.parametrize(
    ("titles", "what"), [({"g": "the training fpb-4bit"}, "the training fpb-4bit"), ({}, "2 x RayTrainWorker")]
)
def test_training_is_named_once_its_workers_have_started(titles, what):
    workers = [actor(class_name="RayTrainWorker", group_id="g", GPU=1.0) for _ in range(2)]
    (held,) = holders("GPU", [group("g", 2, "01000000")], workers, titles=titles)
    assert held == Holding(amount=2.0, what=what, source="job raysubmit_x: python jobs/train.py")


def test_search_evaluation_and_foreign_jobs_are_named():
    held = holders(
        "CPU",
        [
            group("s", 1, "02000000"),
            group("e", 2, "01000000", "the evaluation of fpb-4bit #9a"),
            group("n", 1, "05000000"),
        ],
        [actor(class_name="ImplicitFunc", group_id="s"), actor(class_name="Reader", CPU=0.25)],
        [SimpleNamespace(name="sleep", placement_group_id=None, job_id="01000000", required_resources={"CPU": 0.125})],
    )
    command = f"python mine.py {'y' * 105}..."
    assert [(holding.amount, holding.what, holding.source) for holding in held] == [
        (1.0, "the evaluation of fpb-4bit", "job raysubmit_x: python jobs/train.py"),
        (0.5, "a search (Ray Tune)", f"job 02000000, process 77 on 10.0.0.5: {command}"),
        (0.5, "an empty placement group", "job 05000000"),
        (0.25, "Reader", f"job 02000000, process 77 on 10.0.0.5: {command}"),
        (0.125, "sleep", "job raysubmit_x: python jobs/train.py"),
    ]
