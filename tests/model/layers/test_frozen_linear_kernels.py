"""Kernels for quantised products against plain products: on a GPU, else by an emulation of Triton."""

from __future__ import annotations

import pytest
import torch
from adversarial import assert_near, spoil
from emulated_triton import emulated_kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []

if DEVICE == "cuda":
    from finlora.model.kernels.int8_decode import few_int8
    from finlora.model.kernels.int8_prefill import choose_columns, many_int8
else:
    with emulated_kernels() as kernels:
        few_int8 = kernels.int8_decode.few_int8
        choose_columns, many_int8 = kernels.int8_prefill.choose_columns, kernels.int8_prefill.many_int8

DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
TOLERANCE = 0.01 if DEVICE == "cuda" else 1e-5
"""Tolerance relative to the largest number: on a GPU outputs and NF4's numbers have 8 bits of mantissa."""
SIZES = [(1, 192, 256), (5, 200, 512), (33, 128, 384), (3, 576, 1536)]


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


EPS = 2.0**-7 if DEVICE == "cuda" else 2.0**-18
"""The rounding of the output and of the unpacked weights (2^-8 each on a GPU), and float32's of the sum."""
KINDS = ["zeros", "outliers", "one huge", "subnormal"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), SIZES)
def test_few_rows_times_int8_on_adversarial_numbers(num_rows, num_out, num_in, kind):
    x, residual = spoil(random_rows(num_rows, num_in), kind), random_rows(num_rows, num_out, seed=1)
    values = random_int8(num_out, num_in)
    values[0], values[1], values[2] = 0, 127, -127
    scales = torch.logspace(-6, 4, num_out, device=DEVICE)
    weight = values.double() * scales.double()[:, None] / 127
    assert_near(few_int8(x, values, scales, None), x, weight, eps=EPS)
    assert_near(few_int8(x, values, scales, residual), x, weight, residual, eps=EPS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_row_that_is_not_finite_gives_nothing_finite_and_leaves_the_others(bad):
    """int8 values that are 0 give 0 x inf = NaN, never 0."""
    x, values, scales = random_rows(5, 256), random_int8(128, 256), torch.linspace(0.1, 2.0, 128, device=DEVICE)
    values[:, 100] = torch.where(torch.arange(128, device=DEVICE) % 3 == 0, 0, 5).to(torch.int8)
    clean = few_int8(x, values, scales, None)
    x[2, 100] = bad
    found = few_int8(x, values, scales, None)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_many_rows_with_a_scale_that_is_not_finite_give_nan_there_alone(bad):
    """A row with NaN or values beyond float16: its int8 values are meaningless, its scale is infinite or NaN."""
    x, values = random_int8(40, 256, seed=2), random_int8(192, 256, seed=3)
    rows, scales = torch.linspace(0.5, 3.0, 40, device=DEVICE), torch.linspace(0.1, 2.0, 192, device=DEVICE)
    few_x, few_weights = random_rows(40, 64, seed=4), random_rows(192, 64, seed=5)
    clean = many_int8(x, rows, values, scales, few_x, few_weights, None)
    rows[7] = bad
    found = many_int8(x, rows, values, scales, few_x, few_weights, None)
    assert not found[7].isfinite().any()
    others = [row for row in range(40) if row != 7]
    assert torch.equal(found[others], clean[others])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("num_rows", [3, 100])
@pytest.mark.skipif(DEVICE != "cuda", reason="freeze takes its kernels on a GPU alone")
def test_frozen_weight_on_a_gpu_never_turns_what_is_not_finite_into_a_number(bits, num_rows):
    from finlora.model.layers.frozen_linear import freeze
    from finlora.model.quantised import quantise

    frozen = freeze([quantise(random_rows(256, 512, seed=1), bits, DTYPE)], DTYPE)
    for bad in (float("nan"), float("inf"), float("-inf")):
        x = random_rows(num_rows, 512)
        x[1, 77] = bad
        found = frozen.forward(x)
        assert not found[1].isfinite().any()
        assert found[[0, 2]].isfinite().all()
        grad = random_rows(num_rows, 256)
        grad[1, 7] = bad
        assert not frozen.backward(grad)[1].isfinite().any()
