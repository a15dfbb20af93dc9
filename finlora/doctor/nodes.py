"""Facts of every node of a Ray cluster, from a small task on each with a time limit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from finlora.doctor.checks import Finding, fault
from finlora.doctor.facts import NodeFacts, gather, rebuild
from finlora.machine.foreign_errors import shorten

ANSWER_S = 60.0
"""Time limit for all nodes in seconds; a worker process takes a few to start."""


def gather_nodes(folders: Sequence[str], inputs: Sequence[str]) -> tuple[list[NodeFacts], list[Finding]]:
    """Return the facts of every running node of the connected cluster, and a fault for each that does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    faults = [
        fault("nodes", f"{node['NodeManagerHostname']} is down", "check its service, or start it again: `ray start`")
        for node in ray.nodes()
        if not node["Alive"] and node["NodeManagerHostname"] not in {n["NodeManagerHostname"] for n in nodes.values()}
    ]
    task = ray.remote(num_cpus=0, max_retries=0)(gather)
    waiting = {}
    for node in nodes:
        there = task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))
        waiting[there.remote(list(folders), list(inputs))] = node
    asked, found, late = time.time(), [], list(waiting)
    ends = time.monotonic() + ANSWER_S
    while late and (left := ends - time.monotonic()) > 0:
        ready, late = ray.wait(late, num_returns=1, timeout=left)
        for reference in ready:
            where = nodes[waiting[reference]]
            try:
                found.append(_read(ray.get(reference), where, asked, time.time()))
            except Exception as error:  # for example if FinLoRA is not installed there
                faults.append(
                    fault(
                        "nodes",
                        f"{where['NodeManagerHostname']} cannot run FinLoRA ({shorten(getattr(error, 'cause', None) or error)})",
                        "install the same environment on every node",
                    )
                )
    for reference in late:
        ray.cancel(reference, force=True)
        host = nodes[waiting[reference]]["NodeManagerHostname"]
        faults.append(
            fault("nodes", f"{host} did not answer within {ANSWER_S:g} s", "look at `ray status` and the node's logs")
        )
    return sorted(found, key=lambda facts: facts.host), faults


def _read(values: dict[str, Any], node: dict[str, Any], asked: float, answered: float) -> NodeFacts:
    facts = rebuild(values)
    # The node read its clock between these two times, so a correct clock lies between them.
    skew = facts.clock - min(max(facts.clock, asked), answered)
    return dataclasses.replace(facts, ray_gpus=float(node["Resources"].get("GPU", 0.0)), skew_s=skew)
