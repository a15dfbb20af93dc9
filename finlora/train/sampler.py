"""Which examples each worker sees when: a pure function of seed, epoch and step, so that a resumed run needs no state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampler:
    """Deterministic sharded sampling without replacement.

    An epoch is one permutation of all examples; step s takes its s-th slice of `global_batch_size`. The slice does not
    depend on the number of workers, so neither does the sequence of optimiser updates. The last batch of an epoch may
    be smaller; no example is dropped or seen twice in an epoch.
    """

    num_examples: int
    global_batch_size: int
    world_size: int
    seed: int

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

    def share(self, batch: list[int], worker: int) -> list[int]:
        """Return one worker's share of a global batch; empty when the batch ran out before it."""
        return batch[worker :: self.world_size]
