"""Exact int8 products on a CPU: oneDNN's where the processor has int8 instructions (VNNI), in float32 elsewhere.

Shapes: T rows, K in, N out.

Without VNNI oneDNN adds pairs of products in int16, which saturates at 32,767 (127 x 127 twice is 32,258, and its inputs are
shifted to 0 to 255 first): 8-bit answers would be silently wrong. torch (from 2.6) calls oneDNN only where the processor has VNNI
and otherwise multiplies element by element, which is slow. But it ignores ONEDNN_MAX_CPU_ISA, which can restrict a processor with
VNNI to kernels without it. So two things are tried once: whether the product is exact, and which product is faster.

Source: https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html, https://github.com/pytorch/pytorch/pull/136942
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

_EXACT_COLUMNS = 1024
"""Products of int8 numbers up to 127 whose sum is exact in float32, in any order: 1,024 x 127 x 127 < 2**24."""
_SIZE = 128
_logger = logging.getLogger(__name__)


def multiply_int8(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T exactly. Shapes: (T, K) int8, (N, K) int8 -> (T, N) int32. No number may be -128."""
    if x.is_cuda or has_exact_int8():
        return torch._int_mm(x, weight.t())
    return multiply_in_float32(x, weight)


def multiply_in_float32(x: Tensor, weight: Tensor) -> Tensor:
    """As `multiply_int8`, by float32 sums over so few columns that they are exact."""
    total = torch.zeros(x.shape[0], weight.shape[0], dtype=torch.int32, device=x.device)
    for left, right in zip(x.split(_EXACT_COLUMNS, 1), weight.split(_EXACT_COLUMNS, 1), strict=True):
        total += (left.float() @ right.float().t()).int()
    return total


@functools.cache
def has_exact_int8() -> bool:
    """Return whether torch's int8 product on this CPU is exact, and no slower than one in float32; tried once, in some ms."""
    # The largest values of both signs: any product that can saturate does so here.
    x = torch.full((_SIZE, _SIZE), 127, dtype=torch.int8)
    x[::2] = -127
    weight = torch.full((_SIZE, _SIZE), 127, dtype=torch.int8)
    weight[1::2] = -127
    if not torch.equal(torch._int_mm(x, weight.t()), multiply_in_float32(x, weight)):
        _logger.warning(
            "This CPU's int8 products saturate, as ONEDNN_MAX_CPU_ISA or a CPU without VNNI makes them: 8 bit is computed in "
            "float32 instead, exactly."
        )
        return False
    return _time(lambda: torch._int_mm(x, weight.t())) <= _time(lambda: multiply_in_float32(x, weight))


def _time(run: Callable[[], object]) -> float:
    """Return the seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
