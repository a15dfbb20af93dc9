"""Recorder of a running training: progress records and published metrics. No Ray here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from finlora.optim.traffic import Wire
from finlora.train.run.progress import append_progress
from finlora.train.run.run_folder import RunFolder
from finlora.train.steps.loop import Progress

PUBLISHED = {
    "loss": "Mean cross entropy per answer token, over all workers and the steps since the last record.",
    "learning_rate": "Learning rate of the last step.",
    "tokens_per_second": "Tokens trained per second by all workers, padding not counted.",
    "examples_per_second": "Examples trained per second by all workers.",
    "memory_gib": "Peak GPU memory of this worker, in GiB; on a CPU its resident memory.",
    "step": "Optimiser steps done.",
}
"""Names and descriptions of a worker's metrics."""


class Recorder:
    """Sends each Progress to the run folder (worker 0) and to `publish` (all workers).

    Args:
        num_workers: world size. One small all-reduce shares memory and traffic of all workers.
        read_wire: returns this worker's traffic so far.
        publish: takes this worker's own numbers, named as in PUBLISHED.
    """

    def __init__(
        self,
        folder: RunFolder,
        worker: int,
        num_workers: int,
        read_wire: Callable[[], Wire],
        publish: Callable[[dict[str, float]], None],
    ) -> None:
        self.folder, self.worker, self.num_workers = folder, worker, num_workers
        self.read_wire, self.publish = read_wire, publish
        self.metrics: dict[str, Any] = {}

    def __call__(self, progress: Progress) -> None:
        values = dataclasses.asdict(progress)
        self.publish({name: values[name] for name in PUBLISHED})
        wire = dataclasses.asdict(self.read_wire())
        shared = torch.zeros(self.num_workers, 1 + len(wire), dtype=torch.float64)
        shared[self.worker] = torch.tensor([progress.memory_gib, *wire.values()], dtype=torch.float64)
        if torch.distributed.get_backend() == "nccl":
            shared = shared.cuda()
        memory, *columns = reduce_sum(shared).T.tolist()
        self.metrics = values | {
            "memory_gib": sum(memory),
            "wire": [
                {name: type(wire[name])(value) for name, value in zip(wire, row, strict=True)}
                for row in zip(*columns, strict=True)
            ],
        }
        if self.worker == 0:
            append_progress(self.folder, dataclasses.replace(progress, memory_gib=self.metrics["memory_gib"]))


def reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum a tensor over all workers in place and return it."""
    torch.distributed.all_reduce(values)
    return values
