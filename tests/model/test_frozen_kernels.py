"""Kernels for quantised products against plain products: on a GPU, or with TRITON_INTERPRET=1 where Triton is installed."""

from __future__ import annotations

import os

import bitsandbytes as bnb
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or Triton and TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton", reason="the CPU build of torch brings no Triton")

from finlora.model.base import read_nf4  # noqa: E402
from finlora.model.few_rows import few_int8, few_nf4  # noqa: E402
from finlora.model.many_rows import choose_columns, many_int8  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 0.01 if DEVICE == "cuda" else 1e-5
"""Of the largest number: outputs are rounded to 8 bits of mantissa on a GPU, and NF4's numbers too."""
SIZES = [(1, 192, 256), (5, 200, 512), (33, 128, 384)]


def random_rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, DTYPE)


def random_int8(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(DEVICE)


def assert_close(found, expected):
    assert found.dtype == DTYPE
    assert (found.double() - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), SIZES)
def test_few_rows_times_int8(num_rows, num_out, num_in):
    x, values, residual = (
        random_rows(num_rows, num_in),
        random_int8(num_out, num_in),
        random_rows(num_rows, num_out, seed=1),
    )
    scales = torch.linspace(0.1, 2.0, num_out, device=DEVICE)
    expected = x.double() @ (values.double() * scales.double()[:, None] / 127).t()
    assert_close(few_int8(x, values, scales, None), expected)
    assert_close(few_int8(x, values, scales, residual), expected + residual.double())


@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), [(1, 192, 256), (5, 256, 512), (33, 128, 384)])
def test_few_rows_times_nf4(num_rows, num_out, num_in):
    layers = []
    for number in range(2):
        layer = bnb.nn.Linear4bit(num_in, num_out, bias=False, compute_dtype=DTYPE, quant_type="nf4")
        weight = random_rows(num_out, num_in, seed=number)
        parameter = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
        )
        layer.weight = parameter.to(DEVICE) if DEVICE == "cuda" else parameter._quantize("cpu")
        layers.append(layer)
    layers = layers[: 2 if num_in * num_out % 16384 == 0 else 1]
    states = [layer.weight.quant_state for layer in layers]
    plain = [
        bnb.functional.dequantize_4bit(layer.weight.data.view(-1, 1), layer.weight.quant_state) for layer in layers
    ]
    x, residual = random_rows(num_rows, num_in), random_rows(num_rows, num_out * len(layers), seed=9)
    expected = x.double() @ torch.cat(plain).double().t() + residual.double()
    rows = read_nf4(layers)
    by_table = few_nf4(x, *rows, residual, code=states[0].code)
    assert_close(by_table, expected)
    if DEVICE == "cuda":  # registers are not interpreted
        assert_close(few_nf4(x, *rows, residual), expected)
    for layer, own in zip(layers, plain, strict=True):  # the layers go on working on views
        again = bnb.functional.dequantize_4bit(layer.weight.data.view(-1, 1), layer.weight.quant_state)
        assert torch.equal(again, own)


@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), [*SIZES, (200, 300, 256)])
def test_many_rows_times_int8(num_rows, num_out, num_in):
    x, values = random_int8(num_rows, num_in, seed=2), random_int8(num_out, num_in, seed=3)
    rows, scales = torch.linspace(0.5, 3.0, num_rows, device=DEVICE), torch.linspace(0.1, 2.0, num_out, device=DEVICE)
    few_x, few_weights = random_rows(num_rows, 64, seed=4), random_rows(num_out, 64, seed=5)
    residual = random_rows(num_rows, num_out, seed=6)
    product = x.double() @ values.double().t() * rows.double()[:, None] * scales.double() / 127**2
    expected = product + few_x.double() @ few_weights.double().t()
    assert_close(many_int8(x, rows, values, scales, few_x, few_weights, None), expected)
    assert_close(many_int8(x, rows, values, scales, few_x, few_weights, residual), expected + residual.double())


@pytest.mark.parametrize(("num_in", "share"), [(256, 0.0), (1536, 0.02), (1536, 0.5), (6144, 0.9), (1536, 1.0)])
def test_the_strongest_columns_are_chosen(num_in, share):
    generator = torch.Generator().manual_seed(num_in)
    strength = torch.rand(num_in, generator=generator) * 20 + 6
    if share == 1.0:
        strength.fill_(7.0)  # all equal: the first ones
    strength[torch.rand(num_in, generator=generator) >= share] = 0
    strength = strength.half().to(DEVICE)
    columns, is_chosen, is_held = choose_columns(strength, 64)
    assert len(set(columns.tolist())) == 64
    strongest = strength.sort(descending=True).values[:64]
    assert torch.equal((strength[columns] * is_chosen).sort(descending=True).values, strongest)
    assert torch.equal(is_held.nonzero()[:, 0], columns[is_chosen].sort().values)
    if share == 1.0:
        assert columns.sort().values.tolist() == list(range(64))
