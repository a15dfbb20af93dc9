"""CUDA graphs of a training step's forward and backward pass: some 3,000 launches become one replay.

A graph is valid for one form of pack (`Pack.form`). The first pass of a form runs eagerly, which compiles its kernels; the second
is captured, and later ones are replayed. Run eagerly are forms of which few packs are still to come, and large packs, whose
launches take less time than their work. All passes allocate in one memory pool, since no two run at a time, and on one stream,
since torch reuses memory only on the stream that allocated it: with two streams the pool would hold everything twice.

Source: https://docs.pytorch.org/docs/2.11/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from finlora.data.pack_size import MAX_CAPTURED_ROWS
from finlora.data.packing import Form, Pack
from finlora.model.kernels import launch

MAX_GRAPHS = 64
"""Graphs kept; the least recently used is dropped. Each takes some megabytes of the driver's memory."""

LEAST_USES = 3
"""Packs of a form, the next one included, from which a capture saves time: it costs an eager pass's launches and the graph's
instantiation, and each replay saves most of an eager pass."""

Run = Callable[[Pack, Tensor | None], tuple[Tensor, list[Tensor]]]


class CapturedPasses:
    """Runs padded packs through `run` (pack on the device, dropout seed), with a CUDA graph for a form seen before.

    Args:
        upcoming: packs of each form that are still to come, which is counted down; empty or None: not known, so that each form
            is captured.
    """

    def __init__(self, run: Run, upcoming: Counter[Form] | None = None) -> None:
        self._run, self._upcoming = run, upcoming
        self._pool: torch.cuda.MemPool | None = None
        self._stream: torch.cuda.Stream | None = None
        self._outputs: list[Tensor] = []
        self._seen: set[tuple[object, ...]] = set()
        self._graphs: OrderedDict[tuple[object, ...], _Graph] = OrderedDict()

    def run(self, pack: Pack, seed: int | None, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        """Return loss and gradients of a pack that lies on the host; they are valid until the next call."""
        if self._pool is None or self._stream is None:
            self._pool, self._stream = torch.cuda.MemPool(), torch.cuda.Stream(device)
        form = (*pack.form, seed is None)
        num_left = self._count_down(pack)
        if form in self._graphs:
            self._graphs.move_to_end(form)
        elif form in self._seen and len(pack.input_ids) <= MAX_CAPTURED_ROWS and num_left >= LEAST_USES:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
            self._graphs[form] = _Graph(self._run, pack, seed, device, self._pool, self._stream, self._outputs)
        else:
            self._seen.add(form)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.use_mem_pool(self._pool, device), torch.cuda.stream(self._stream):
                loss, gradients = self._run(pack.to(device), _to_seed(seed, device))
            torch.cuda.current_stream(device).wait_stream(self._stream)
            if not self._outputs:
                self._outputs = [torch.empty_like(tensor) for tensor in (loss, *gradients)]
            return loss, gradients
        self._graphs[form].replay(pack, seed)
        return self._outputs[0], self._outputs[1:]

    def _count_down(self, pack: Pack) -> int:
        """Return how many packs of a form are to come with this one; LEAST_USES where it is not known."""
        if not self._upcoming:
            return LEAST_USES
        form = pack.form
        self._upcoming[form] -= 1
        return self._upcoming[form] + 1


class _Graph:
    """A captured form and the memory of its inputs.

    Args:
        outputs: where all graphs write loss and gradients; otherwise each would hold memory of its own for them.
    """

    def __init__(
        self,
        run: Run,
        pack: Pack,
        seed: int | None,
        device: torch.device,
        pool: torch.cuda.MemPool,
        stream: torch.cuda.Stream,
        outputs: list[Tensor],
    ) -> None:
        self.inputs, self.seed = pack.to(device), _to_seed(seed, device)
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with launch.capture_graph(self.graph, pool, stream):
            loss, gradients = run(self.inputs, self.seed)
            torch._foreach_copy_(outputs, [loss, *gradients])

    def replay(self, pack: Pack, seed: int | None) -> None:
        for own, new in zip(self.inputs.tensors(), pack.tensors(), strict=True):
            own.copy_(new, non_blocking=True)
        if self.seed is not None and seed is not None:
            self.seed.fill_(seed)
        self.graph.replay()


def _to_seed(seed: int | None, device: torch.device) -> Tensor | None:
    return None if seed is None else torch.full((), seed, dtype=torch.int32, device=device)
