"""Search on local Ray nodes whose trial drivers are killed: scores must be equal, and no trial is trained twice."""

from __future__ import annotations

import json
import random
import time

from tests.chaos.nodes.node_failure import settings
from tests.chaos.record import Injection, Tally
from tests.chaos.train import LIMIT_S, FaultyCluster, values_of, wait_until


def break_search(tally: Tally, seed: int) -> None:
    """Run a search undisturbed, then the same search with kills of its trial drivers."""
    if tally.is_over:
        return
    cluster, rng = FaultyCluster(), random.Random(f"{seed} tune")
    injections: list[Injection] = []
    try:
        cluster.start()
        quiet = cluster.launch("tune", *_search_settings(cluster, "quiet"))
        wait_until("the undisturbed search", lambda: quiet.poll() is not None, limit_s=2 * LIMIT_S)
        if quiet.returncode != 0:
            raise RuntimeError(f"the undisturbed search exited with {quiet.returncode}: {cluster.last_line()}")
        search = cluster.launch("tune", *_search_settings(cluster, "troubled"))
        for _ in range(3):
            own = rng.randrange(2**32)
            wait_until("a trial", lambda: bool(cluster.find("trial")) or search.poll() is not None)
            time.sleep(random.Random(own).uniform(1, 15))
            victims = cluster.find("trial")
            if not victims:
                continue
            victims[-1].kill()
            injections.append(Injection("killed", "trial of a search", own, "the trial restarts and resumes"))
        wait_until("the search", lambda: search.poll() is not None, limit_s=3 * LIMIT_S)
        lost = (
            _compare_searches(cluster)
            if search.returncode == 0
            else f"the search exited with {search.returncode}: {cluster.last_line()}"
        )
    finally:
        left = cluster.close()
    lost = lost or ", ".join(left)
    for each in injections:
        tally.add(Injection(**{**values_of(each), "lost": lost}))


def _compare_searches(cluster: FaultyCluster) -> str:
    found = []
    for name in ("quiet", "troubled"):
        records = sorted((cluster.nodes.folder / "runs" / name / "trials").glob("*/trial.json"))
        values = [json.loads(path.read_text(encoding="utf-8")) for path in records]
        found.append(
            [(v["trial"]["name"], v["state"], v["step"], v["held_out_loss"], v["scores"]["accuracy"]) for v in values]
        )
    return "" if found[0] == found[1] and found[0] else f"trials {found[1]} instead of {found[0]}"


def _search_settings(cluster: FaultyCluster, name: str) -> list[str]:
    own = [each for each in settings(cluster.nodes, name, 40) if not each.startswith("train.num_workers")]
    search = ("search.num_trials=2", "search.bits=[16]", "search.rank=[2,4]", "search.reduction_factor=1")
    small = ("train.num_workers=1", "train.cpus_per_worker=0.9", "data.max_test_examples=16", "eval.device=cpu")
    return [
        *own,
        *small,
        *search,
        "search.max_concurrent=1",
        "eval.bits=null",
        "train.max_failures=10",
        "max_wait_s=600",
    ]
