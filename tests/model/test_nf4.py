"""NF4's pairs against bitsandbytes' table, and the kernel that reads them, on a GPU, against its unpacked weights."""

from __future__ import annotations

import adversarial
import bitsandbytes as bnb
import pytest
import torch
from adversarial import spoil

from finlora.model.frozen import MAX_FEW_ROWS, Nf4Weight
from finlora.model.nf4 import pair_up, read_nf4, unpack_nf4


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")(test))


SIZES = [(1, 192, 256), (5, 256, 512), (8, 256, 1024), (16, 1000, 4096), (33, 128, 512), (64, 520, 768)]
"""(rows, outputs, columns): tiles that are cut, blocks that begin in the middle of one, one and several tiles of rows."""
KINDS = ["ordinary", "zeros", "outliers", "one huge", "subnormal"]


def test_every_byte_stands_for_its_two_numbers():
    numbers = bnb.functional.get_4bit_type("nf4", device="cpu")
    pairs = pair_up(numbers)
    assert pairs.shape == (256,)
    low = (pairs & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    high = (pairs >> 16).to(torch.int16).view(torch.bfloat16)
    rounded = numbers.bfloat16()
    assert low.tolist() == [rounded[byte >> 4].item() for byte in range(256)]
    assert high.tolist() == [rounded[byte & 15].item() for byte in range(256)]


def make_layer(weight):
    num_out, num_in = weight.shape
    layer = bnb.nn.Linear4bit(num_in, num_out, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
    ).to("cuda")
    return layer


def random_rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def assert_near(found, x, weight, residual=None):
    """NF4's numbers, bitsandbytes' weights and the output are rounded: 2^-8 each."""
    assert found.dtype == torch.bfloat16
    adversarial.assert_near(found, x, weight, residual, eps=3 * 2.0**-8)


@on_gpu
@pytest.mark.parametrize("large_bytes", [0, 2**40], ids=["large", "small"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), SIZES)
def test_few_rows(num_rows, num_out, num_in, kind, large_bytes, monkeypatch):
    from finlora.model.few_nf4 import few_nf4

    monkeypatch.setattr("finlora.model.few_nf4._LARGE_BYTES", large_bytes)
    layer = make_layer(spoil(random_rows(num_out, num_in, seed=3), kind))
    plain = bnb.functional.dequantize_4bit(layer.weight.data.view(-1, 1), layer.weight.quant_state).double()
    x, residual = spoil(random_rows(num_rows, num_in), kind), random_rows(num_rows, num_out, seed=1)
    rows = read_nf4([layer])
    assert_near(few_nf4(x, rows, None), x, plain)
    found = few_nf4(x, rows, residual)
    assert_near(found, x, plain, residual)
    assert torch.equal(found, few_nf4(x, rows, residual))  # parts are added in one order


@on_gpu
@pytest.mark.parametrize("num_rows", [1, 7, 17, MAX_FEW_ROWS])
def test_projections_of_one_input_side_by_side(num_rows):
    layers = [make_layer(random_rows(num_out, 512, seed=number)) for number, num_out in enumerate((256, 64, 64))]
    plain = [unpack_nf4(layer, torch.bfloat16).clone() for layer in layers]
    weight = Nf4Weight(layers, torch.bfloat16)
    assert weight.rows is not None
    x = random_rows(num_rows, 512, seed=9)
    assert_near(weight.forward(x), x, torch.cat(plain).double())
    for layer, own in zip(layers, plain, strict=True):  # the layers go on working on views
        assert torch.equal(unpack_nf4(layer, torch.bfloat16), own)


@on_gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_row_that_is_not_finite_gives_nothing_finite_and_leaves_the_others(bad):
    weight = Nf4Weight([make_layer(random_rows(128, 256, seed=3))], torch.bfloat16)
    x = random_rows(5, 256)
    clean = weight.forward(x)
    x[2, 100] = bad
    found = weight.forward(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@on_gpu
def test_kernel_runs_in_a_thread_that_has_not_used_the_gpu():
    from concurrent.futures import ThreadPoolExecutor

    weight = Nf4Weight([make_layer(random_rows(128, 256, seed=3))], torch.bfloat16)
    x = random_rows(5, 256)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(weight.forward, x).result(), weight.forward(x))
