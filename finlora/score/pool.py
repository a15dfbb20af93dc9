"""Ray Data actor pool of a scoring's engines: one per GPU or share of one, one per core on CPU, or one over several stages."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finlora.cluster.lease import take_lease
from finlora.errors import FinloraError, StageLostError
from finlora.score.score_plan import ScorePlan
from finlora.score.scorer import Scorer
from finlora.score.table import Part

PARTS_AT_ONCE = 3
"""Parts of an engine in progress: one is computed, while the next is read and encoded, and the last one sealed."""


class ScoreActor:
    """Ray Data actor with an engine: takes a batch of part numbers, and returns it when the parts are sealed.

    Ray calls it in PARTS_AT_ONCE threads.
    """

    def __init__(self, plan: ScorePlan, out: str, cache_rows: int) -> None:
        from finlora.machine.cpu import set_environment

        set_environment()
        self._parts = plan.table.parts
        self._scorer = Scorer(plan, Path(out), cache_rows)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["part"]:
            self._scorer.score(self._parts[int(number)])
        return batch


def score_parts(
    plan: ScorePlan,
    out: Path,
    cache_rows: int,
    parts: Sequence[Part],
    num_engines: int,
    on_done: Callable[[Part], None],
    announce: Callable[[str], None],
) -> None:
    """Score parts on the connected Ray cluster, in any order.

    Args:
        parts: the parts that are not sealed yet.
        num_engines: actors, each with the whole model, and eval.num_gpus GPUs or one core.
        on_done: called with each part when it is sealed.
        announce: shows a line while the engines wait for GPUs or cores.

    Raises:
        ResourceError: the cluster has too few GPUs or cores, or Ray gave up restarting an engine.
    """
    import ray.data
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = find_bundle(plan)
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it logs its plan and progress; ours are shown instead
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    title = f"the scoring of {out.name}"
    with take_lease([bundle] * num_engines, plan.config.max_wait_s, announce, name=title) as group:
        numbers = ray.data.from_items([{"part": part.number} for part in parts], override_num_blocks=len(parts))
        with warnings.catch_warnings():
            # Ray Data 2.60 has no other way to use a placement group; 2.64 is to drop this one.
            warnings.filterwarnings("ignore", "`ray_remote_args_fn` is deprecated")
            scored = numbers.map_batches(
                ScoreActor,
                fn_constructor_args=(plan, str(out), cache_rows),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(
                    size=num_engines,
                    max_tasks_in_flight_per_actor=PARTS_AT_ONCE,  # more would leave other engines idle at the end
                    max_concurrent_calls_per_actor=PARTS_AT_ONCE,
                    enable_true_multi_threading=True,
                ),
                num_cpus=bundle["CPU"],
                num_gpus=bundle.get("GPU", 0.0),
                ray_remote_args_fn=lambda: {"scheduling_strategy": PlacementGroupSchedulingStrategy(group)},
            )
        try:
            for row in scored.iter_rows():
                on_done(plan.table.parts[int(row["part"])])
        except Exception as error:
            raise _explain(error) from error


def find_bundle(plan: ScorePlan) -> dict[str, float]:
    """Return the resources of an engine's actor. Over stages it needs almost none: the stages have their own."""
    config = plan.config.eval
    if config.num_stages > 1:
        return {"CPU": 0.01}
    return {"CPU": 1.0} | ({"GPU": config.num_gpus} if config.device == "cuda" else {})


def count_engines(plan: ScorePlan, wanted: int | None) -> int:
    """Return the number of engines: `wanted`, else one for each eval.num_gpus of the cluster's GPUs, one on CPU."""
    import ray

    if wanted is not None:
        return wanted
    config = plan.config.eval
    if config.num_stages > 1 or config.device != "cuda":
        return 1
    return max(1, int(ray.cluster_resources().get("GPU", 0.0) / config.num_gpus + 1e-6))


def _explain(error: Exception) -> Exception:
    """Return our own error if Ray has wrapped one, else an error about the crash."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FinloraError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    lines = str(error).strip().splitlines()
    return StageLostError(
        f"an engine crashed ({type(error).__name__}: {lines[-1] if lines else ''}): finished parts are kept; "
        "run the same command again."
    )
