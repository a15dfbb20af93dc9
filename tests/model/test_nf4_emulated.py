"""The kernels for NF4 weights, run without a GPU (emulated_gpu.cpp), against bitsandbytes' own unpacking on CPU."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from importlib import resources
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch

from finlora.model.nf4 import Nf4Tiles, take_tiles, unpack_nf4

COMPILER = shutil.which("g++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="the kernels are compiled for the processor by g++")
WARPS, HEIGHT, NUM_SLOTS = 8, 256, 5


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Compile the kernels for so many times 8 rows, and parts of x, for this machine's processor."""
    folder, built = tmp_path_factory.mktemp("emulated"), {}

    def compile_(row_tiles, x_parts):
        if (row_tiles, x_parts) not in built:
            target = folder / f"kernels-{row_tiles}-{x_parts}.so"
            defines = [f"-DWARPS={WARPS}", f"-DROW_TILES={row_tiles}", f"-DX_PARTS={x_parts}", "-DBLOCKS=1"]
            source = [f"-I{resources.files('finlora.model')}", str(Path(__file__).with_name("emulated_gpu.cpp"))]
            flags = ["-std=c++20", "-O2", "-w", "-fPIC", "-shared", "-pthread"]
            subprocess.run([COMPILER, *flags, *defines, *source, "-o", str(target)], check=True)
            built[row_tiles, x_parts] = ctypes.CDLL(str(target))
        return built[row_tiles, x_parts]

    return compile_


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


def multiply(kernels, x, weight, residual, is_gated):
    (num_rows, num_in), num_out = x.shape, len(weight.means)
    num_heights, num_columns = -(-num_out // HEIGHT), num_in // 256
    steps = num_heights * num_columns
    steps_a_block = -(-steps // NUM_SLOTS)
    blocks = -(-steps // steps_a_block)
    parts = torch.full(((blocks + num_heights) * num_rows * HEIGHT,), float("nan"))
    inputs = (x, weight.tiles, weight.level_code, weight.level_scales, weight.means, weight.pairs, parts)
    kernels.run_few(blocks, *map(point, inputs), num_rows, num_out, num_in, steps, steps_a_block)
    num_targets = num_out // 2 if is_gated else num_out
    out = torch.empty(num_rows, num_targets, dtype=torch.bfloat16)
    sizes = (num_rows, num_targets, num_columns, steps_a_block)
    kernels.run_add(*map(point, (parts, residual, out)), *sizes, int(is_gated))
    return out


@pytest.mark.parametrize(
    ("num_rows", "num_out", "num_in", "x_parts"),
    [(9, 520, 1280, 1), (16, 320, 768, 2), (11, 72, 256, 2)],
    ids=["whole steps of x", "halves", "one step"],
)
def test_product_of_few_rows(num_rows, num_out, num_in, x_parts, build):
    plain, weight = make(num_out, num_in)
    generator = torch.Generator().manual_seed(1)
    x, residual = (torch.randn(num_rows, size, generator=generator).bfloat16() for size in (num_in, num_out))
    found = multiply(build(2, x_parts), x, weight, residual, is_gated=False)
    terms = x.double().abs() @ plain.double().abs().t() + residual.double().abs()
    # NF4's numbers, bitsandbytes' weights and the output are rounded: 2^-8 each.
    difference = (found.double() - (x.double() @ plain.double().t() + residual.double())).abs()
    assert (difference <= 3 * 2.0**-8 * terms).all()
    without = multiply(build(2, x_parts), x, weight, None, is_gated=False)
    assert (without - (found - residual)).abs().max() <= 2.0**-7 * terms.max()


def test_gated_product_is_that_of_its_halves(build):
    _, weight = make(640, 512)
    x = torch.randn(9, 512, generator=torch.Generator().manual_seed(2)).bfloat16() * 0.1
    gate, up = multiply(build(2, 1), x, weight, None, is_gated=False).chunk(2, 1)
    found = multiply(build(2, 1), x, weight, None, is_gated=True)
    expected = torch.nn.functional.silu(gate.float()).bfloat16() * up
    torch.testing.assert_close(found, expected, rtol=2.0**-7, atol=1e-6)


@pytest.mark.parametrize(("num_out", "num_in"), [(72, 2560), (32, 256)])
def test_unpacked_numbers_are_those_of_bitsandbytes(num_out, num_in, build):
    plain, weight = make(num_out, num_in)
    found = torch.zeros_like(plain)
    inputs = (weight.tiles, weight.level_code, weight.level_scales, weight.means, weight.numbers, found)
    build(2, 1).run_unpack(*map(point, inputs), num_out, num_in)
    assert torch.equal(found.view(torch.int16), plain.view(torch.int16))
