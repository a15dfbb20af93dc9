"""Deterministic sampler of global batches: a pure function of seed and step, so that a resumed run needs no state."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """Sharded sampling without replacement.

    An epoch is one permutation of all examples; step s takes its s-th slice of `global_batch_size`. The slice does not
    depend on the number of workers, so neither does the sequence of optimiser updates. The last batch of an epoch may
    be smaller. No example is dropped or seen twice in an epoch.

    The shares of a batch have about the same number of tokens, since workers wait for each other: the longest example first,
    each to the worker with the fewest tokens so far (Graham 1969, doi:10.1137/0117039, rule LPT). No worker gets more examples
    than an even split would give it.
    """

    lengths: Sequence[int]
    """Tokens of each example."""
    global_batch_size: int
    world_size: int
    seed: int

    @property
    def num_examples(self) -> int:
        return len(self.lengths)

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.global_batch_size)

    def global_batch(self, step: int) -> list[int]:
        """Return the example indices of an optimiser step, counted from 0 over the whole run."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        start = position * self.global_batch_size
        return [int(index) for index in order[start : start + self.global_batch_size]]

    def batches(self, num_steps: int) -> Iterator[list[int]]:
        """Yield the global batches of the first steps of the run, as `global_batch` gives them one by one."""
        for epoch in range(-(-num_steps // self.steps_per_epoch)):
            order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples).tolist()
            for position in range(min(self.steps_per_epoch, num_steps - epoch * self.steps_per_epoch)):
                yield order[position * self.global_batch_size : (position + 1) * self.global_batch_size]

    def shares(self, batch: Sequence[int]) -> list[list[int]]:
        """Return every worker's share of a global batch, each in the batch's order; empty where the batch is too small."""
        most = -(-len(batch) // self.world_size)
        waiting = [(0, worker) for worker in range(self.world_size)]
        chosen: list[list[int]] = [[] for _ in waiting]
        for position in sorted(range(len(batch)), key=lambda position: -self.lengths[batch[position]]):
            num_tokens, worker = heapq.heappop(waiting)
            chosen[worker].append(position)
            if len(chosen[worker]) < most:
                heapq.heappush(waiting, (num_tokens + self.lengths[batch[position]], worker))
        return [[batch[position] for position in sorted(own)] for own in chosen]

    def share(self, batch: Sequence[int], worker: int) -> list[int]:
        """Return one worker's share of a global batch."""
        return self.shares(batch)[worker]
