"""Forecast of memory that no batch changes: weights, adapter, optimiser state and load peak, from config.json alone.

It counts torch's allocations (torch.cuda.max_memory_allocated). The CUDA context takes about CUDA_CONTEXT_GIB beside them, as the
driver reports it. GiB = 2**30 bytes. padded_memory.py and packed_memory.py forecast the activations.

Sources: QLoRA, arXiv:2305.14314, section 3 (NF4 blocks of 64, absmax double-quantised in blocks of 256); LLM.int8(),
arXiv:2208.07339 (int8 with a float32 scale a row); finlora/model/base.py for the order of loading.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from finlora.config import Bits
from finlora.formula.llama import LlamaShape, find_projection, list_tensors
from finlora.formula.lora_config import LoraConfig
from finlora.formula.low_rank import is_magnitude, list_adapter_tensors
from finlora.optim.optimizer import find_optimizer

GIB = 2**30
CUDA_CONTEXT_GIB = 1.3
"""Memory of the CUDA context and of cuBLAS outside torch's allocator: 1.1 to 1.3 measured on an H200 with torch 2.11."""


def context_gib(device: str) -> float:
    """Return the memory of a process outside torch's allocator."""
    return CUDA_CONTEXT_GIB if device == "cuda" else 0.0


_NF4_BLOCK, _ABSMAX_BLOCK = 64, 256
_NF4_TABLES = 16 * 4 + 256 * 4 + 4  # NF4 code, code of the second quantisation, offset: float32, once a layer


def count_weight_bytes(shape: LlamaShape, bits: Bits, element_bytes: int = 2) -> int:
    """Return the bytes of the frozen base on the device, as finlora/model/base.py loads it.

    Args:
        element_bytes: bytes of the compute type: 2 for bfloat16, 4 for float32.
    """
    rotary = 2 * (shape.head_dim // 2) * 4  # inverse frequencies and their original, float32
    return rotary + sum(final for final, _ in _load_steps(shape, bits, element_bytes))


def count_load_peak_bytes(shape: LlamaShape, bits: Bits, element_bytes: int = 2) -> int:
    """Return the peak device memory of loading: the tensors loaded so far, and one tensor in flight.

    A tensor in flight to 4 bit is held unquantised, with its float32 absmax before and after centring; to 8 bit unquantised and
    as float16. A tensor that stays unquantised is loaded where it stays.
    """
    done = peak = 0
    for final, in_flight in _load_steps(shape, bits, element_bytes):
        peak = max(peak, done + final + in_flight)
        done += final
    return max(peak, count_weight_bytes(shape, bits, element_bytes))


def _load_steps(shape: LlamaShape, bits: Bits, element_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield (final bytes, extra bytes in flight) of each tensor in loading order."""
    for tensor in list_tensors(shape):
        size = math.prod(tensor.shape)
        if bits == 16 or not tensor.is_projection:
            yield size * element_bytes, 0
        elif bits == 8:
            yield size + 4 * tensor.shape[0], size * element_bytes + size * 2
        else:
            blocks = -(-size // _NF4_BLOCK)
            final = -(-size // 2) + blocks + 4 * -(-blocks // _ABSMAX_BLOCK) + _NF4_TABLES
            yield final, size * element_bytes + 2 * 4 * blocks


def count_start_bytes(shape: LlamaShape, lora: LoraConfig) -> int:
    """Return the memory, beside the weights, in which `lora.init` takes a part out of the largest projection; 0 by default.

    Its float32 copy, the factors, the difference, and as much again as the copy for the solver's workspace.
    """
    if not lora.changes_base:
        return 0
    return 5 * 4 * max(math.prod(find_projection(target).size(shape)) for target in lora.target_modules)


def adapter_sizes(shape: LlamaShape, lora: LoraConfig) -> list[int]:
    """Return the number of parameters of each adapter tensor."""
    return [math.prod(size) for _, size in list_adapter_tensors(shape, lora.settings)]


def count_adapter_parameters(shape: LlamaShape, lora: LoraConfig) -> int:
    """Return the sum of rank * (in + out) over the target modules of all layers."""
    return sum(adapter_sizes(shape, lora))


def count_adapter_file_bytes(shape: LlamaShape, lora: LoraConfig) -> int:
    """Return the exact size of adapter_model.safetensors: 8 bytes, a JSON header padded to 8, bfloat16 tensors; m in float32.

    Source: https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    # As the writer does: wide types first, then by name.
    tensors = sorted(list_adapter_tensors(shape, lora.saved), key=lambda item: (not is_magnitude(item[0]), item[0]))
    for name, size in tensors:
        dtype, width = ("F32", 4) if is_magnitude(name) else ("BF16", 2)
        end = offset + width * math.prod(size)
        header[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8 + offset


def count_optimizer_bytes(
    shape: LlamaShape,
    lora: LoraConfig,
    optimizer: str,
    num_workers: int,
    parameter_bytes: int = 4,
    *,
    has_factors: bool = False,
) -> int:
    """Return the bytes of gradients and optimiser state of one worker, by the optimiser's record.

    Args:
        has_factors: learning rates differ between parameters.

    Raises:
        ConfigError: there is no optimiser of that name.
    """
    sizes = adapter_sizes(shape, lora)
    state = find_optimizer(optimizer).count_state_bytes(sizes, num_workers, parameter_bytes, has_factors)
    return parameter_bytes * sum(sizes) + state
