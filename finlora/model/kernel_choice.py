"""Which tensors are computed on by the Triton and CUDA kernels of this package, as far as the device decides.

One function, so that tests run these paths on a processor by emulations of Triton, FlashAttention and CUDA graphs.
"""

from __future__ import annotations

from torch import Tensor


def takes_kernels(tensor: Tensor) -> bool:
    """Return whether kernels are launched for a tensor: on a GPU."""
    return tensor.is_cuda
