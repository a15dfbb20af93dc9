"""Queue of jobs, on a simulated cluster."""

from __future__ import annotations

import time
from types import SimpleNamespace

import job_queue
import pytest


class Cluster:
    """Replacement of JobSubmissionClient; a job ends at the second poll, one named in `failing` with a failure."""

    def __init__(self, failing=(), hanging=()):
        self.failing, self.hanging = failing, hanging
        self.submitted, self.asked, self.stopped, self.most = [], {}, set(), 0

    def submit_job(self, *, entrypoint, submission_id, runtime_env, **resources):
        self.submitted.append((entrypoint, runtime_env["working_dir"], resources))
        self.asked[submission_id] = 0
        self.most = max(self.most, sum(count < 2 for count in self.asked.values()))

    def get_job_status(self, identity):
        self.asked[identity] += 1
        name = identity.rpartition("-")[0]
        is_over = identity in self.stopped or (self.asked[identity] >= 2 and name not in self.hanging)
        return SimpleNamespace(is_terminal=lambda: is_over, value="FAILED" if name in self.failing else "SUCCEEDED")

    def stop_job(self, identity):
        self.stopped.add(identity)

    def get_job_logs(self, identity):
        return f"log of {identity}"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(job_queue, "_POLL_SECONDS", 0.0)


def make_jobs(cluster):
    def job(name, *needs, kept=False, **more):
        ran = lambda: kept or any(name in entrypoint for entrypoint, *_ in cluster.submitted)  # noqa: E731
        return job_queue.Job(name=name, command=("jobs/x.py", name), needs=needs, is_done=ran, **more)

    return job


def run(cluster, tmp_path, jobs, seconds=60.0, max_jobs=2):
    queue = job_queue.JobQueue(cluster, tmp_path / "code", tmp_path / "logs", max_jobs)
    return queue.run(jobs, time.monotonic() + seconds)


def test_jobs_run_in_order_of_need_a_few_at_a_time(tmp_path):
    cluster = Cluster()
    job = make_jobs(cluster)
    jobs = [job("here", kept=True), job("base", "here", driver_gpus=1.0), job("score", "train"), job("train", "base")]
    outcome = run(cluster, tmp_path, [*jobs, job("more", "base"), job("most", "base")])
    assert (outcome.kept, sorted(outcome.finished)) == (["here"], ["base", "more", "most", "score", "train"])
    assert cluster.submitted[0] == (
        "python jobs/x.py base",
        str(tmp_path / "code"),
        {"entrypoint_num_gpus": 1.0},
    )
    order = [entrypoint.rpartition(" ")[2] for entrypoint, *_ in cluster.submitted]
    assert order.index("base") < order.index("train") < order.index("score") < order.index("most")
    assert cluster.most == 2
    assert (tmp_path / "logs" / "score.log").read_text().startswith("log of score")


def test_what_needs_a_failed_job_is_not_run(tmp_path, capsys):
    cluster = Cluster(failing=("train",))
    job = make_jobs(cluster)
    outcome = run(cluster, tmp_path, [job("train"), job("score", "train"), job("report", "score"), job("other")])
    assert (outcome.failed, outcome.finished, outcome.not_run) == (["train"], ["other"], ["score", "report"])
    assert "FAILED   train" in (shown := capsys.readouterr().out)
    assert "    log of train" in shown


def test_time_limit_stops_what_runs_and_keeps_what_ended(tmp_path):
    cluster = Cluster(hanging=("endless",))
    job = make_jobs(cluster)
    outcome = run(cluster, tmp_path, [job("quick"), job("endless"), job("later", "endless")], seconds=0.3)
    assert (outcome.finished, outcome.failed, outcome.not_run) == (["quick"], [], ["endless", "later"])
    assert len(cluster.stopped) == 1
