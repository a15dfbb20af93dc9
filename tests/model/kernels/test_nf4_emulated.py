"""NF4 kernels and their launches without a GPU (emulated_gpu.cpp), compared with bitsandbytes on CPU."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import subprocess
import sys
import types
from importlib import resources
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from emulated_triton import emulated_kernels

from finlora.model.kernels import launch
from finlora.model.kernels.nf4 import Nf4Tiles, take_tiles, unpack_nf4
from finlora.model.layers.elementwise import gate
from finlora.model.layers.frozen_linear import MAX_FEW_ROWS, TiledNf4Weight, freeze, multiply_gated

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the kernels are compiled for the processor by g++")
NUM_PROCESSORS = 5
SHARED_BYTES = {"whole steps of x": (232448, 233472), "halves": (101376, 102400)}
"""Shared memory of a block and of a multiprocessor: H200 and A6000."""


class EmulatedKernel:
    """Replacement of finlora.model.kernels.compile_cuda.CudaKernel."""

    def __init__(self, function):
        self._function, self.blocks_a_processor = function, 1

    def launch(self, grid, *arguments, overlaps=False):
        values = [argument if isinstance(argument, int) else point(argument) for argument in arguments]
        self._function(*grid, *values)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Compile the kernels for this machine's processor, once for each set of constants."""
    folder, built = tmp_path_factory.mktemp("emulated"), {}

    def compile_(defines):
        name = "-".join(f"{key}{value}" for key, value in sorted(defines.items()))
        if name not in built:
            target = folder / f"{name}.so"
            constants = {"ROW_TILES": 2, "X_PARTS": 1, "BLOCKS": 1} | defines
            source = [
                f"-I{resources.files('finlora.model.kernels')}",
                str(Path(__file__).parents[2] / "emulated" / "emulated_gpu.cpp"),
            ]
            flags = ["-std=c++20", "-O2", "-w", "-fPIC", "-shared", "-pthread"]
            flags += [f"-D{key}={value}" for key, value in constants.items()]
            subprocess.run([COMPILER, *flags, *source, "-o", str(target)], check=True)
            built[name] = ctypes.CDLL(str(target))
        return built[name]

    return compile_


@pytest.fixture(params=SHARED_BYTES)
def few(request, compiled, monkeypatch):
    """finlora.model.kernels.nf4_products on a GPU with such shared memory, whose kernels are emulated."""

    def load_kernels(files, device, defines, sizes):
        assert defines["WARPS"] == 8  # threads of a block, in emulated_gpu.cpp
        library = compiled(defines)
        assert all(shared <= SHARED_BYTES[request.param][0] for _, shared in sizes.values())
        return {name: EmulatedKernel(getattr(library, f"launch_{name}")) for name in sizes}

    source = types.ModuleType("finlora.model.kernels.compile_cuda")
    source.CudaKernel, source.load_kernels = EmulatedKernel, load_kernels
    monkeypatch.setitem(sys.modules, source.__name__, source)
    for name in ("nf4_products", "int8_decode"):
        monkeypatch.delitem(sys.modules, f"finlora.model.kernels.{name}", raising=False)
    with emulated_kernels(NUM_PROCESSORS):
        module = importlib.import_module("finlora.model.kernels.nf4_products")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(module, "num_processors", lambda _device: NUM_PROCESSORS)
        monkeypatch.setattr(module, "_find_shared_bytes", lambda _device: SHARED_BYTES[request.param])
        yield module


def make_layer(num_out, num_in):
    weight = torch.randn(num_out, num_in, generator=torch.Generator().manual_seed(num_out)).bfloat16()
    layer = bnb.nn.Linear4bit(num_in, num_out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    packed = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
    layer.weight = packed._quantize("cpu")
    return layer


def make(num_out, num_in) -> tuple[torch.Tensor, Nf4Tiles]:
    """Return a weight as bitsandbytes unpacks it, and its tiles."""
    layer = make_layer(num_out, num_in)
    return unpack_nf4(layer, torch.bfloat16), take_tiles([layer])


def point(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@pytest.mark.parametrize(
    ("num_rows", "num_out", "num_in"), [(9, 520, 1280), (11, 72, 256), (3, 576, 1536)], ids=["", "one step", "SmolLM2"]
)
def test_product_of_few_rows(num_rows, num_out, num_in, few):
    plain, weight = make(num_out, num_in)
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(num_rows, size, generator=generator).bfloat16() for size in (num_in, num_out))
    found = few.few_nf4(x, weight, residual)
    terms = x.double().abs() @ plain.double().abs().t() + residual.double().abs()
    # NF4's numbers, bitsandbytes' weights and the output are rounded: 2^-8 each.
    difference = (found.double() - (x.double() @ plain.double().t() + residual.double())).abs()
    assert (difference <= 3 * 2.0**-8 * terms).all()
    if num_in == 256:
        without = few.few_nf4(x, weight, None)
        assert (without - (found - residual)).abs().max() <= 2.0**-7 * terms.max()


def test_gated_product_is_that_of_its_halves(few):
    _, weight = make(640, 512)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(2)).bfloat16() * 0.1
    gate, up = few.few_nf4(x, weight, None).chunk(2, 1)
    expected = torch.nn.functional.silu(gate.float()).bfloat16() * up
    torch.testing.assert_close(few.few_gated_nf4(x, weight), expected, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize(("num_out", "num_in"), [(72, 2560), (32, 256)])
@pytest.mark.parametrize("few", ["whole steps of x"], indirect=True)
def test_unpacked_numbers_are_those_of_bitsandbytes(num_out, num_in, few):
    plain, weight = make(num_out, num_in)
    assert torch.equal(few.unpack_tiles(weight).view(torch.int16), plain.view(torch.int16))


@pytest.mark.parametrize("few", ["whole steps of x"], indirect=True)
@pytest.mark.parametrize("num_rows", [2, MAX_FEW_ROWS + 6])
def test_frozen_projections_side_by_side_take_the_kernels(num_rows, few, monkeypatch):
    """The layers that `freeze` makes from 4-bit ones on a GPU: few rows together, more with each projection unpacked."""
    monkeypatch.setattr(launch, "takes_kernels", lambda _tensor: True)
    layers = [make_layer(num_out, 256) for num_out in (128, 64, 64)]
    plain = torch.cat([unpack_nf4(layer, torch.bfloat16) for layer in layers])
    weight = freeze(layers, torch.bfloat16, consumes=True)
    assert isinstance(weight, TiledNf4Weight)
    x = torch.randn(num_rows, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    found = weight.forward(x)
    terms = x.double().abs() @ plain.double().abs().t()
    assert ((found.double() - x.double() @ plain.double().t()).abs() <= 3 * 2.0**-8 * terms).all()
    gate_up = multiply_gated(weight, x)
    expected = gate(found)
    torch.testing.assert_close(gate_up, expected, rtol=2.0**-6, atol=2.0**-6 * float(expected.abs().max()))


def test_blocks_have_the_shared_memory_that_they_ask_for(few, monkeypatch):
    """For each number of rows; nothing is compiled."""
    kernels = {}

    def load_kernels(files, device, defines, sizes):
        kernels.update(defines=defines, sizes=sizes)
        return dict.fromkeys(sizes, EmulatedKernel(None))

    monkeypatch.setattr(few, "load_kernels", load_kernels)
    of_block, of_processor = few._find_shared_bytes(None)
    for num_rows in range(1, MAX_FEW_ROWS + 1):
        few._load.__wrapped__(max(8, 1 << (num_rows - 1).bit_length()) // 8, torch.device("cpu"))
        assert kernels["defines"]["ROW_TILES"] * 8 >= num_rows
        _, shared = kernels["sizes"]["few_nf4"]
        assert shared <= of_block
        assert kernels["defines"]["BLOCKS"] * (shared + 1024) <= of_processor
