"""Passes that compute one token of each of several requests, recorded as CUDA graphs: hundreds of launches become one.

A graph holds for one number of rows, so rows are filled up to the next of SIZES; those that fill up write to a cache row of
their own. A size runs as it is at first, which compiles its kernels, is recorded when it comes again and replayed from then on.
On CPU the same passes run as they are.

Shapes: T rows, H hidden. Source: https://docs.pytorch.org/docs/2.11/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from finlora.engine.microbatch import MicroBatch

SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64)
"""Rows of recorded passes; larger ones run as any other micro-batch does."""

Run = Callable[["Rows", Tensor | None], Tensor]


class Rows:
    """Where the rows of a pass stand, as one (6, T) int64 tensor.

    Args:
        numbers: ids, positions, cache rows, first key rows, key rows, adapters' numbers.
        has_adapters: whether any row uses an adapter.
    """

    def __init__(self, numbers: Tensor, *, has_adapters: bool) -> None:
        self.has_adapters = has_adapters
        self.ids, self.positions, self.slots, starts, lengths, self.adapters = numbers
        self.starts = torch.nn.functional.pad(starts.int(), (0, 1))
        self.lengths = lengths.int()
        self.cumulative_queries = torch.arange(numbers.shape[1] + 1, dtype=torch.int32, device=numbers.device)


def is_decode(batch: MicroBatch) -> bool:
    """Return whether every row of a micro-batch is a request's next token, whose keys lie side by side."""
    return (
        batch.num_rows <= SIZES[-1]
        and not batch.copies
        and all(segment.num_rows == 1 and len(segment.keys) == 1 for segment in batch.segments)
    )


class DecodePasses:
    """Runs decode micro-batches.

    Args:
        run: computes rows, from hidden states (T, H) where the stage is not the first.
        spare_row: cache row that belongs to no request.
    """

    def __init__(self, run: Run, spare_row: int, device: torch.device) -> None:
        self._run, self._spare_row, self._device = run, spare_row, device
        self._graphs: dict[tuple[int, bool], _Graph] = {}
        self._seen: set[tuple[int, bool]] = set()
        self._pool: torch.cuda.MemPool | None = None

    def forget(self) -> None:
        """Drop what is recorded, since tensors that it reads have moved."""
        self._graphs.clear()

    def run(self, batch: MicroBatch, hidden: Tensor | None, adapters: dict[str | None, int]) -> Tensor:
        """Return the pass's result for the rows of the micro-batch; it holds until the next call."""
        count = batch.num_rows
        size = next(size for size in SIZES if size >= count) if self._device.type == "cuda" else count
        numbers = self._lay_out(batch, size, adapters)
        if hidden is not None and size > count:
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, size - count))
        # Without an adapter in it, a pass is recorded without their products.
        has_adapters = any(name is not None for name, _ in batch.adapters)
        if self._device.type != "cuda":
            return self._run(Rows(numbers, has_adapters=has_adapters), hidden)
        key = (size, has_adapters)
        if key in self._graphs:
            return self._graphs[key].replay(numbers, hidden)[:count]
        if key in self._seen:
            self._pool = self._pool or torch.cuda.MemPool()
            self._graphs[key] = _Graph(self._run, numbers, hidden, has_adapters, self._device, self._pool)
            return self._graphs[key].replay(numbers, hidden)[:count]
        self._seen.add(key)
        on_device = None if hidden is None else hidden.to(self._device)
        return self._run(Rows(numbers.to(self._device), has_adapters=has_adapters), on_device)[:count]

    def _lay_out(self, batch: MicroBatch, size: int, adapters: dict[str | None, int]) -> Tensor:
        names = [adapters[name] for name, rows in batch.adapters for _ in range(rows)]
        keys = [segment.keys[0] for segment in batch.segments]
        filling = size - batch.num_rows
        return torch.tensor(
            [
                batch.input_ids + [0] * filling,
                batch.positions + [0] * filling,
                batch.slots + [self._spare_row] * filling,
                [start for start, _ in keys] + [self._spare_row] * filling,
                [count for _, count in keys] + [1] * filling,
                names + [0] * filling,
            ]
        )


class _Graph:
    """One recorded pass with the memory that its inputs are read from."""

    def __init__(
        self,
        run: Run,
        numbers: Tensor,
        hidden: Tensor | None,
        has_adapters: bool,
        device: torch.device,
        pool: torch.cuda.MemPool,
    ) -> None:
        self.numbers = numbers.to(device)
        self.hidden = None if hidden is None else hidden.to(device, copy=True)
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool.id):  # type: ignore[arg-type]
            self.output = run(Rows(self.numbers, has_adapters=has_adapters), self.hidden)

    def replay(self, numbers: Tensor, hidden: Tensor | None) -> Tensor:
        self.numbers.copy_(numbers)
        if self.hidden is not None and hidden is not None:
            self.hidden.copy_(hidden)
        self.graph.replay()
        return self.output
