"""Emulation of CUDA graphs on CPU: a capture records each operation, a replay repeats them on the same memory.

As on a GPU, a replay reads and writes the tensors of the capture and runs no Python: a number that Python read from the first
micro-batch stays in the graph and gives a wrong answer with the second. As in CUDA, a capture refuses to read a tensor on the
host, and tensors made from Python numbers, whose memory is freed before the replay.
"""

from __future__ import annotations

import gc
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_active = []
"""Graphs in capture."""
REFUSED = ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "unique")


class Graph(TorchDispatchMode):
    """Replacement of torch.cuda.CUDAGraph."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.num_replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in REFUSED, (
            f"{func} in a capture: CUDA refuses it, or the graph would hold the first run's numbers"
        )
        # A GPU computes nothing in a capture: ids may still be negative placeholders of sampled tokens.
        is_lookup = name == "embedding"
        out = args[0].new_zeros(*args[1].shape, args[0].shape[1]) if is_lookup else func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        self.num_replays += 1
        with torch.inference_mode():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Pool:
    id = (0, 1)


class Stream:
    """Replacement of torch.cuda.Stream."""

    def __init__(self, *_args, **_settings):
        self.waits = 0

    def wait_stream(self, _other):
        self.waits += 1

    def synchronize(self):
        pass


@contextmanager
def capture(graph, **_settings):
    assert not gc.isenabled(), "garbage collection in a capture may free graphs and pools, which CUDA refuses there"
    _active.append(graph)
    try:
        with graph:
            yield
    finally:
        _active.remove(graph)


def launch(kernel):
    """Run an emulated kernel; a capture records it as one operation with its tensors."""
    with _disable_current_modes():
        kernel()
    for graph in _active:
        graph.calls.append((kernel, (), {}, None))


def emulate_graphs(patch):
    """Replace torch.cuda's graphs by the emulation, with a pytest.MonkeyPatch; returns the list of captured graphs."""
    made = []

    def make():
        made.append(Graph())
        return made[-1]

    patch.setattr(torch.cuda, "CUDAGraph", make)
    patch.setattr(torch.cuda, "graph", capture)
    patch.setattr(torch.cuda, "MemPool", Pool)
    patch.setattr(torch.cuda, "Stream", Stream)
    patch.setattr(torch.cuda, "current_stream", lambda *_args: Stream())
    patch.setattr(torch.cuda, "stream", lambda _stream: nullcontext())
    patch.setattr(torch.cuda, "use_mem_pool", lambda *_args: nullcontext())
    patch.setattr(torch.cuda, "synchronize", lambda *_args: None)
    return made
