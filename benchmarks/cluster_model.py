"""Time model of training on many GPUs: measured steps, the optimisers' messages, and assumed links.

A rank's step takes `step_seconds`, scaled by the tokens of its examples. Lengths are sampled from a log-normal distribution and
shared by the product's sampler (finlora/train/steps/sampler.py); each rank and step gets a log-normal factor of mean 1 for the
variation between machines. Ranks wait for the slowest, but only at steps with communication. Size and time of the messages
come from the optimisers' code (finlora/optim/onebit.py, wire.py).

Times of an average over n ranks with 2 (n - 1) messages a rank, not overlapped with computing, as in FinLoRA's training:

    ring         2 (n - 1) rounds of one latency and one message, at the speed of the ring's slowest link
    tree         2 ceil(log2 n) latencies and twice the vector (NCCL's choice for small vectors on many nodes)
    all-to-all   n - 1 rounds of one latency; a node's link carries everything its GPUs send to other nodes
    all-gather   n - 1 rounds of the ring
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from finlora.optim.onebit import Schedule, Traffic, padded_size
from finlora.optim.traffic import GRADIENT_BYTES, ring_bytes
from finlora.train.steps.sampler import Sampler

_MEAN_TOKENS, _NUM_DEALS = 100, 30

Method = Literal["adamw ring", "adamw tree", "adamw free", "0/1 adam"]
"""`adamw free`: links take no time, so only the wait for the slowest rank is lost."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction of a connection."""

    name: str
    bytes_per_second: float
    """Rate that programs reach, not the data sheet's."""
    latency_s: float
    """Latency of a message between two programs."""

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + num_bytes / self.bytes_per_second


PCIE = Link(name="PCIe 4.0 x16", bytes_per_second=25e9, latency_s=10e-6)
ETHERNET_10 = Link(name="10 GbE", bytes_per_second=1.17e9, latency_s=30e-6)
ETHERNET_100 = Link(name="100 GbE", bytes_per_second=11.7e9, latency_s=10e-6)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Nodes with a few GPUs each."""

    between: Link
    """One a node, shared by its GPUs."""
    inside: Link = PCIE
    gpus_a_node: int = 4

    def slowest(self, num_gpus: int) -> Link:
        """Return the slowest link of a ring."""
        return self.inside if num_gpus <= self.gpus_a_node else self.between

    def ring_seconds(self, num_gpus: int, num_elements: int) -> float:
        return 2 * (num_gpus - 1) * self.slowest(num_gpus).seconds(GRADIENT_BYTES * num_elements / num_gpus)

    def tree_seconds(self, num_gpus: int, num_elements: int) -> float:
        link = self.slowest(num_gpus)
        return (
            2 * math.ceil(math.log2(num_gpus)) * link.latency_s
            + 2 * GRADIENT_BYTES * num_elements / link.bytes_per_second
        )

    def compressed_seconds(self, traffic: Traffic) -> float:
        """All-to-all, then all-gather."""
        n, message = traffic.world_size, traffic.bytes_a_compressed_message
        link = self.slowest(n)
        here = min(n, self.gpus_a_node)
        carried = max(
            (n - 1) * message / self.inside.bytes_per_second,
            here * (n - here) * message / self.between.bytes_per_second,
        )
        return (n - 1) * link.latency_s + carried + (n - 1) * link.seconds(message)


@dataclass(frozen=True, kw_only=True)
class Load:
    """Work and trained parameters of every rank."""

    name: str
    sizes: Sequence[int]
    """Elements of each trained parameter."""
    step_seconds: float
    """Mean time of a rank's step without any communication."""
    batch_size: int = 16
    """Examples a rank and step."""
    spread: float
    """Standard deviation of the examples' lengths over their mean."""
    jitter: float
    """Standard deviation of the time of the same work over its mean."""
    block_size: int = 512


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of the simulation; bytes, rounds and seconds are a rank's over the whole run."""

    efficiency: float
    """Share of time in which the ranks compute: 1 for a single rank."""
    bytes_sent: int
    rounds: int
    wire_seconds: float


def sample_steps(load: Load, num_gpus: int, num_steps: int) -> np.ndarray:
    """Return seconds, (steps, ranks)."""
    return load.step_seconds * _sample_work(load.batch_size, load.spread, load.jitter, num_gpus, num_steps)


@cache
def _sample_work(batch_size: int, spread: float, jitter: float, num_gpus: int, num_steps: int) -> np.ndarray:
    rng = np.random.default_rng(num_gpus)
    total = batch_size * num_gpus
    lengths = np.rint(_MEAN_TOKENS * _around_one(rng, spread, _NUM_DEALS * total)).astype(int).tolist()
    sampler = Sampler(lengths=lengths, global_batch_size=total, world_size=num_gpus, seed=0)
    tokens = np.array(
        [[sum(lengths[i] for i in share) for share in sampler.shares(batch)] for batch in sampler.batches(_NUM_DEALS)]
    )
    # Sharing many examples takes long, so each share-out is reused, with its shares on other ranks.
    work = rng.permuted(tokens[rng.integers(_NUM_DEALS, size=num_steps)] / tokens.mean(), axis=1)
    return work * _around_one(rng, jitter, work.shape)


def _around_one(rng: np.random.Generator, spread: float, size: int | tuple[int, ...]) -> np.ndarray:
    sigma = math.sqrt(math.log1p(spread**2))
    return rng.lognormal(-(sigma**2) / 2, sigma, size)


def simulate(cluster: Cluster, load: Load, method: Method, schedule: Schedule, steps: np.ndarray) -> Outcome:
    """Run an optimiser's schedule on a cluster.

    Args:
        schedule: of 0/1 Adam; the other methods use only its number of steps.
        steps: from `sample_steps`, one rank for each GPU of the cluster.
    """
    n = steps.shape[1]
    num_elements = sum(load.sizes)
    clocks, busy = np.zeros(n), np.zeros(n)
    bytes_sent, rounds, wire_seconds = 0, 0, 0.0
    if method == "0/1 adam":
        traffic = Traffic(padded_size(load.sizes, load.block_size, n), load.block_size, n)
        costs = {
            "exact": (traffic.bytes_per_exact, cluster.ring_seconds(n, traffic.num_elements)),
            "one_bit": (traffic.bytes_per_compressed, cluster.compressed_seconds(traffic)),
        }
        kinds = list(schedule.exchanges())
    else:
        times = {"adamw ring": cluster.ring_seconds, "adamw tree": cluster.tree_seconds}
        seconds = times[method](n, num_elements) if method in times else 0.0
        costs = {"exact": (ring_bytes(num_elements, n), seconds)}
        kinds = ["exact"] * schedule.total_steps
    for kind, work in zip(kinds, steps, strict=True):
        clocks += work
        busy += work
        if kind is None or n == 1:
            continue
        num_bytes, seconds = costs[kind]
        clocks[:] = clocks.max() + seconds
        bytes_sent, rounds, wire_seconds = bytes_sent + num_bytes, rounds + 1, wire_seconds + seconds
    return Outcome(
        efficiency=float(busy.sum() / (n * clocks.max())) if n > 1 else float(busy[0] / clocks[0]),
        bytes_sent=bytes_sent,
        rounds=rounds,
        wire_seconds=wire_seconds,
    )
