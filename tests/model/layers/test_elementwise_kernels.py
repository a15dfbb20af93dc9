"""Triton kernels of the elementwise steps against the steps in plain torch: on a GPU, else by an emulation of Triton."""

from __future__ import annotations

import pytest
import torch
from emulated_triton import emulated_kernels

from finlora.model.kernels import launch
from finlora.model.layers import elementwise, frozen_linear
from finlora.model.layers.elementwise import draw_keep, drop_threshold

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

P = 0.1
SIZES = [(1, 16), (7, 24), (70, 576), (3, 2100)]
"""Rows and columns: one row, columns that are no power of two, several programs, columns in several blocks."""


@pytest.fixture
def kernels(monkeypatch):
    """On a CPU: an emulated Triton, and all tensors of a GPU."""
    if DEVICE.type == "cuda":
        yield
        return
    monkeypatch.setattr(launch, "takes_kernels", lambda _tensor: True)
    with emulated_kernels(numbers=None):
        yield


def sample(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def arguments_of(rows, width, dtype=torch.bfloat16):
    """Return the arguments of each step by name."""
    x, weight, threshold = sample(rows, width, dtype=dtype), sample(width, seed=1, dtype=dtype), drop_threshold(P)
    grad, residual = sample(rows, width, seed=2, dtype=dtype), sample(rows, width, seed=3, dtype=dtype)
    seed = torch.tensor(-5, dtype=torch.int32)
    keep = draw_keep(seed, x, 3, threshold)
    heads = sample(rows, 7, 24, seed=4, dtype=dtype)  # queries, keys and values, of which values are not rotated
    integers = torch.randint(-127, 128, (rows, width), generator=torch.Generator().manual_seed(5))
    scales, held = torch.linspace(0.1, 3.0, rows), torch.arange(width) % 3 == 0
    strong = x * 3
    taken = torch.randperm(width, generator=torch.Generator().manual_seed(6))[:13]
    return {
        "normalise": (x, weight, 1e-5),
        "draw_keep": (seed, x, 5, threshold),
        "normalise_and_drop": (x, weight, 1e-5, keep, 3, threshold),
        "normalise_backward": (grad, x, weight, 1e-5, residual),
        "normalise_and_drop_backward": (
            *(grad, sample(3, rows, width, seed=7, dtype=dtype), x, weight, 1e-5, residual, keep, threshold),
        ),
        "rotate": (heads[:, :5], sample(rows, 24, seed=8, dtype=dtype), sample(rows, 24, seed=9, dtype=dtype)),
        "normalise_heads": (heads, sample(5, 24, seed=11, dtype=dtype), 1e-5),
        "normalise_heads_backward": (
            heads,
            sample(rows, 7, 24, seed=12, dtype=dtype),
            sample(7, 24, dtype=dtype),
            1e-5,
        ),
        "gate": (sample(rows, 2 * width, seed=10, dtype=dtype),),
        "gate_backward": (grad, sample(rows, 2 * width, seed=10, dtype=dtype)),
        "drop": (x, keep, threshold),
        "drop_backward": (grad, residual, keep, threshold),
        "gate_and_drop": (sample(rows, 2 * width, seed=10, dtype=dtype), keep, threshold),
        "gate_and_drop_backward": (grad, residual, sample(rows, 2 * width, seed=10, dtype=dtype), keep, threshold),
        "_find_outliers": (strong,),
        "_quantise_rows": (strong, held),
        "_take_columns": (x, taken, taken % 2 == 0),
        "_scale_product": (integers.int() * 1000, scales, torch.linspace(0.5, 2.0, width), dtype),
        "_unpack_int8": (integers.to(torch.int8), scales, dtype),
    }


def run(name, arguments, device):
    step = getattr(elementwise, name, None) or getattr(frozen_linear, name)
    if name.startswith("normalise_heads"):  # they work in place
        arguments = (arguments[0].clone(), *arguments[1:])
    found = step(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments))
    return found if isinstance(found, tuple) else (found,)


@pytest.fixture(scope="module")
def expected():
    """Results of the plain steps, which must not see the emulation."""
    return {
        (name, size, dtype): run(name, arguments, "cpu")
        for size in SIZES
        for dtype in (torch.bfloat16, torch.float32)
        for name, arguments in arguments_of(*size, dtype).items()
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", sorted(arguments_of(1, 16)))
def test_kernel_equals_the_plain_step(name, size, dtype, expected, kernels):
    arguments = arguments_of_before_emulation(name, size, dtype)
    for own, plain in zip(run(name, arguments, DEVICE), expected[name, size, dtype], strict=True):
        assert own.dtype == plain.dtype
        assert own.shape == plain.shape
        own = own.cpu()
        if not plain.is_floating_point():
            # An int8 number between two others may be rounded to either.
            most = 1 if name == "_quantise_rows" and DEVICE.type == "cuda" else 0
            assert int((own.int() - plain.int()).abs().max()) <= most
        elif plain.dtype == torch.bfloat16:
            torch.testing.assert_close(own, plain, rtol=2**-7, atol=2**-8)  # one unit in the last place of bfloat16
        else:
            torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)


KNOWN = {(size, dtype): arguments_of(*size, dtype) for size in SIZES for dtype in (torch.bfloat16, torch.float32)}


def arguments_of_before_emulation(name, size, dtype):
    """Return arguments made at import: they are made by a plain step themselves."""
    return KNOWN[size, dtype][name]


SUMS = ["normalise", "normalise_and_drop", "normalise_backward", "normalise_and_drop_backward"]


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("width", [24, 576])
def test_sum_of_a_row_does_not_depend_on_the_other_rows(name, width, kernels):
    """The same bits in a pack of 40 rows and in one of 3: a resumed run sees other packs first."""
    many = KNOWN_SUMS[width][name]
    few = [cut_rows(value, 3) for value in many]
    for whole, part in zip(run(name, many, DEVICE), run(name, few, DEVICE), strict=True):
        assert torch.equal(cut_rows(whole, 3), part)


KNOWN_SUMS = {width: arguments_of(40, width) for width in (24, 576)}


def cut_rows(value, count):
    """Return the first rows of a tensor with rows; anything else as it is."""
    has_rows = isinstance(value, torch.Tensor) and value.dim() >= 2
    return value[..., :count, :].contiguous() if has_rows else value


def test_row_with_nan_has_a_scale_that_is_not_finite_and_the_others_are_as_without(kernels):
    x, held = sample(5, 600, dtype=torch.float32).to(DEVICE), torch.zeros(600, dtype=torch.bool, device=DEVICE)
    clean_rows, clean_scales = frozen_linear._quantise_rows(x, held)
    x[2, 7] = torch.nan
    rows, scales = frozen_linear._quantise_rows(x, held)
    assert not scales[2].isfinite()
    others = [0, 1, 3, 4]
    assert torch.equal(scales[others], clean_scales[others])
    assert torch.equal(rows[others], clean_rows[others])


def test_outliers_are_sought_in_all_rows(kernels):
    """More rows than parts of them: each row's outlier is found."""
    x = torch.zeros(700, 40, device=DEVICE)
    rows, columns = torch.arange(0, 700, 17), torch.arange(0, 700, 17) % 40
    x[rows, columns] = 6.0 + rows.to(DEVICE) / 100
    x[5, 3] = 5.9
    wanted = torch.zeros(40).scatter_reduce(0, columns, 6.0 + rows / 100, "amax")
    torch.testing.assert_close(frozen_linear._find_outliers(x).float().cpu(), wanted, rtol=1e-3, atol=0)


def test_every_step_with_a_kernel_is_tried():
    import inspect

    source = {
        name: inspect.getsource(value)
        for module in (elementwise, frozen_linear)
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__
    }
    assert {name for name, text in source.items() if "finlora.model.rowwise" in text} == set(arguments_of(1, 16))
