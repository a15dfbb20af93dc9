"""Emulation of Triton on CPU: programs run one after the other on torch tensors, without Triton (some 200 MB).

It is stricter than a GPU: an unmasked read or write outside a tensor fails, masked values are NaN (or a number that no test
expects) unless `other` is given, block sizes must be powers of two, and products must have the sizes and types of tensor cores.
It has only the operations of this project's kernels.

Source: https://triton-lang.org/main/python-api/triton.language.html
"""

from __future__ import annotations

import importlib
import inspect
import sys
import time
import types
from contextlib import contextmanager
from itertools import product

import emulated_graphs
import torch

LAUNCH_OPTIONS = ("num_warps", "num_stages", "launch_pdl")
KERNELS, STEPS = "finlora.model.kernels", "finlora.model.rowwise"
MODULES = {
    **dict.fromkeys(("int8_decode", "int8_prefill", "decode_attention", "rms_norm", "write_kv"), KERNELS),
    **dict.fromkeys(("elementwise_steps", "dropout_steps", "norm_steps", "int8_steps"), STEPS),
}
"""Modules with Triton kernels, each with its package; a module stands after those that it imports."""
_program = None  # (program ids, number of programs) of the running program


class Pointer:
    """Addresses in one tensor. Shapes: () or those of a block."""

    def __init__(self, tensor, offsets=None):
        # Columns of wider rows are one piece of memory, in which the kernel is given the stride of a row.
        assert tensor.is_contiguous() or tensor[:1].is_contiguous(), "a kernel is given an address, not strides"
        span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.tensor = tensor.as_strided((span,), (1,))
        self.offsets = torch.zeros((), dtype=torch.int64) if offsets is None else offsets
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset):
        return Pointer(self.tensor, self.offsets + offset)

    def pick(self, mask):
        """Return flat offsets and their mask; unmasked ones must lie inside."""
        offsets = self.offsets.long()
        if mask is None:
            mask = torch.ones((), dtype=torch.bool)
        offsets, mask = torch.broadcast_tensors(offsets, torch.as_tensor(mask))
        wanted = offsets[mask]
        if wanted.numel():
            low, high = int(wanted.min()), int(wanted.max())
            assert 0 <= low <= high < len(self.tensor), f"offsets {low} to {high} of {len(self.tensor)} numbers"
        return offsets, mask


def load(pointer, mask=None, other=None):
    offsets, mask = pointer.pick(mask)
    dtype = pointer.tensor.dtype
    if other is None:
        other = torch.nan if dtype.is_floating_point else -77
    out = torch.full(offsets.shape, other, dtype=dtype)
    out[mask] = pointer.tensor[offsets[mask]]
    return out


def store(pointer, value, mask=None):
    shape = torch.broadcast_shapes(pointer.offsets.shape, torch.as_tensor(value).shape)
    offsets, mask = Pointer(pointer.tensor, pointer.offsets.broadcast_to(shape)).pick(mask)
    assert offsets.shape == shape or mask.numel() == 1
    value = torch.as_tensor(value).to(pointer.tensor.dtype).broadcast_to(offsets.shape)
    pointer.tensor[offsets[mask]] = value[mask]


def is_block(size):
    return size > 0 and size & (size - 1) == 0


def arange(start, end):
    assert is_block(end - start), f"a block of {end - start}: expected a power of two"
    return torch.arange(start, end, dtype=torch.int32)


def full(shape, value, dtype):
    assert all(map(is_block, shape)), f"a block of {shape}: expected powers of two"
    return torch.full(shape, value, dtype=dtype)


def dot(left, right, acc=None, out_dtype=torch.float32):
    assert left.dtype == right.dtype, f"a product of {left.dtype} and {right.dtype}"
    least = 32 if left.dtype == torch.int8 else 16
    assert left.shape[0] >= 16, left.shape
    assert left.shape[1] == right.shape[0] >= least, (left.shape, right.shape)
    assert right.shape[1] >= 16, right.shape
    wide = torch.int32 if left.dtype == torch.int8 else torch.float32
    out = left.to(wide) @ right.to(wide)
    assert out.dtype == (out_dtype if acc is None else acc.dtype)
    return out if acc is None else acc + out


def reduce(function):
    def call(block, axis=None):
        block = block.reshape(-1) if axis is None else block
        return function(block, 0 if axis is None else axis)

    return call


def total(block, axis):
    return block.sum(axis, dtype=block.dtype)


def jit(function=None, *, do_not_specialize=()):
    """Replacement of `triton.jit`, with and without arguments."""
    if function is None:
        return lambda own: jit(own, do_not_specialize=do_not_specialize)
    names = inspect.signature(function).parameters
    assert set(do_not_specialize) <= set(names), f"{do_not_specialize}: not all are arguments of {function.__name__}"
    return Kernel(function)


class Kernel:
    """A function under `triton.jit`; called by another one, it runs as a part of it."""

    def __init__(self, function):
        self.function = function
        self.launches = []

    def __call__(self, *args):
        return self.function(*args)

    def __getitem__(self, grid):
        def launch(*args, **settings):
            self.launches.append(grid)
            settings = {name: value for name, value in settings.items() if name not in LAUNCH_OPTIONS}
            assert not {name for name in settings if name.islower()}, f"{settings}: constants are written in capitals"
            sizes = (*(int(size) for size in grid), 1, 1)[:3]
            assert min(sizes) >= 1
            assert sizes[0] < 2**31
            assert max(sizes[1:]) < 2**16, f"a grid of {grid}: CUDA takes 65,535 in y and z"

            def run():
                global _program
                pointers = [Pointer(each) if isinstance(each, torch.Tensor) else each for each in args]
                for ids in product(*map(range, sizes)):
                    _program = ids, sizes
                    self.function(*pointers, **settings)

            run.__name__ = self.function.__name__
            emulated_graphs.launch(run)

        return launch


def make_modules():
    """Return the modules of Triton by name."""
    triton, language = types.ModuleType("triton"), types.ModuleType("triton.language")
    extra, cuda = types.ModuleType("triton.language.extra"), types.ModuleType("triton.language.extra.cuda")
    triton.jit, triton.language = jit, language
    triton.cdiv = language.cdiv = lambda size, part: -(-size // part)
    triton.next_power_of_2 = lambda size: 1 << (size - 1).bit_length()
    language.__dict__.update(
        load=load, store=store, arange=arange, full=full, dot=dot, where=torch.where, maximum=torch.maximum,
        zeros=lambda shape, dtype: full(shape, 0, dtype), sum=reduce(total), max=reduce(torch.amax),
        cumsum=lambda block, axis: block.cumsum(axis, dtype=block.dtype), trans=torch.t,
        exp2=torch.exp2, log2=torch.log2, rsqrt=torch.rsqrt, sigmoid=torch.sigmoid, abs=torch.abs, constexpr=int,
        static_range=range,
        program_id=lambda axis: torch.tensor(_program[0][axis]), num_programs=lambda axis: torch.tensor(_program[1][axis]),
        uint8=torch.uint8, int8=torch.int8, int32=torch.int32, int64=torch.int64, float16=torch.float16,
        float32=torch.float32,
    )  # fmt: skip
    cuda.globaltimer = lambda: torch.tensor(time.perf_counter_ns())
    cuda.gdc_launch_dependents = cuda.gdc_wait = lambda: None
    extra.libdevice = types.SimpleNamespace(rint=torch.round)
    found = (triton, language, extra, cuda)
    return {module.__name__: module for module in found}


@contextmanager
def emulated_kernels(num_processors=6, numbers=2**15):
    """Yield the modules with Triton kernels, imported with the emulation, by name; removes them afterwards.

    Args:
        num_processors: multiprocessors of the GPU.
        numbers: that a program of an elementwise step computes; None: as on a GPU. Each program takes some 0.2 ms here.
    """
    fakes = make_modules()
    names = [f"{package}.{name}" for name, package in MODULES.items()]
    packages = {package: importlib.import_module(package) for package in (KERNELS, STEPS)}
    before = {name: sys.modules.pop(name, None) for name in (*fakes, *names)}
    attributes = {name: packages[package].__dict__.pop(name, None) for name, package in MODULES.items()}
    sys.modules |= fakes
    try:
        modules = {name: importlib.import_module(f"{package}.{name}") for name, package in MODULES.items()}
        for module in modules.values():
            if hasattr(module, "num_processors"):
                module.num_processors = lambda _device: num_processors
            if hasattr(module, "_NUMBERS") and numbers is not None:
                module._NUMBERS = numbers
        yield types.SimpleNamespace(**modules)
    finally:
        for name, module in before.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for name, module in attributes.items():
            packages[MODULES[name]].__dict__.pop(name, None)
            if module is not None:
                setattr(packages[MODULES[name]], name, module)
