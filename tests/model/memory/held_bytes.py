"""Count of the memory that torch holds while a pass runs."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldBytes(TorchDispatchMode):
    """Bytes of live storages created inside, and their peak. Saved-tensor hooks would miss tensors that a custom autograd
    function keeps on its node, as bitsandbytes' 8-bit matmul does."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self):
        return sum(self.alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if id(storage) not in given and key not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, self.now)
        return result
