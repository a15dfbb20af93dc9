"""A search on Ray nodes of this machine whose trials lose their drivers: the same scores come out, no trial is trained twice."""

from __future__ import annotations

import json
import random
import time

from tests.chaos.nodes.node_failure import settings
from tests.chaos.record import Injection, Tally
from tests.chaos.train import LIMIT_S, Fire, values_of, wait_until


def run_search_under_fire(tally: Tally, seed: int) -> None:
    """Search once in peace, then while the drivers of its trials are killed."""
    if tally.is_over:
        return
    fire, rng = Fire(), random.Random(f"{seed} tune")
    injections: list[Injection] = []
    try:
        fire.start()
        quiet = fire.launch("tune", *_search_settings(fire, "quiet"))
        wait_until("the quiet search", lambda: quiet.poll() is not None, limit_s=2 * LIMIT_S)
        if quiet.returncode != 0:
            raise RuntimeError(f"the quiet search ended with {quiet.returncode}: {fire.said()}")
        search = fire.launch("tune", *_search_settings(fire, "troubled"))
        for _ in range(3):
            own = rng.randrange(2**32)
            wait_until("a trial", lambda: bool(fire.find("trial")) or search.poll() is not None)
            time.sleep(random.Random(own).uniform(1, 15))
            victims = fire.find("trial")
            if not victims:
                continue
            victims[-1].kill()
            injections.append(Injection("killed", "trial of a search", own, "the trial is started again and goes on"))
        wait_until("the search", lambda: search.poll() is not None, limit_s=3 * LIMIT_S)
        lost = (
            _compare_searches(fire) if search.returncode == 0 else f"it ended with {search.returncode}: {fire.said()}"
        )
    finally:
        left = fire.close()
    lost = lost or ", ".join(left)
    for each in injections:
        tally.add(Injection(**{**values_of(each), "lost": lost}))


def _compare_searches(fire: Fire) -> str:
    found = []
    for name in ("quiet", "troubled"):
        records = sorted((fire.nodes.folder / "runs" / name / "trials").glob("*/trial.json"))
        values = [json.loads(path.read_text(encoding="utf-8")) for path in records]
        found.append(
            [(v["trial"]["name"], v["state"], v["step"], v["held_out_loss"], v["scores"]["accuracy"]) for v in values]
        )
    return "" if found[0] == found[1] and found[0] else f"other trials: {found[1]} instead of {found[0]}"


def _search_settings(fire: Fire, name: str) -> list[str]:
    own = [each for each in settings(fire.nodes, name, 40) if not each.startswith("train.num_workers")]
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
