"""NF4's pairs and tiles, and on a GPU the kernels that read them against bitsandbytes' unpacked weights."""

from __future__ import annotations

from types import SimpleNamespace

import adversarial
import bitsandbytes as bnb
import pytest
import torch
from adversarial import spoil

from finlora.inference.open_base import choose_batch_rows
from finlora.model.kernels.nf4 import can_tile, lay_tiles, pair_up, take_tiles, unpack_nf4
from finlora.model.layers.elementwise import gate
from finlora.model.layers.frozen_linear import MAX_FEW_ROWS, Nf4Weight, TiledNf4Weight, freeze, multiply_gated


def on_gpu(test):
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel needs a GPU")(test))


SIZES = [
    (1, 192, 256),
    (5, 256, 512),
    (8, 256, 1024),
    (16, 1000, 4096),
    (33, 128, 512),
    (64, 520, 768),
    (12, 40000, 2560),
]
"""(rows, outputs, columns): partial tiles, blocks that continue in the next row of tiles, one and several tiles of rows."""
KINDS = ["ordinary", "zeros", "outliers", "one huge", "subnormal"]


def test_every_byte_encodes_its_two_numbers():
    numbers = bnb.functional.get_4bit_type("nf4", device="cpu")
    pairs = pair_up(numbers)
    assert pairs.shape == (256,)
    low = (pairs & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    high = (pairs >> 16).to(torch.int16).view(torch.bfloat16)
    rounded = numbers.bfloat16()
    assert low.tolist() == [rounded[byte >> 4].item() for byte in range(256)]
    assert high.tolist() == [rounded[byte & 15].item() for byte in range(256)]


def test_tiles_hold_each_number_where_the_kernels_look_for_it():
    """In the layout of mma.m16n8k16's first operand (PTX ISA 8.5, 9.7.14.5.8), with columns in the order of a lane's bytes."""
    num_out, num_in = 40, 512
    packed = torch.randint(0, 256, (num_out, num_in // 2), dtype=torch.uint8)
    levels = torch.randint(0, 256, (num_out, num_in // 64), dtype=torch.uint8)
    tiles = lay_tiles(packed, levels)
    assert tiles.shape == (2, 2, 4224)
    for out in range(64):
        strip, m, eight, row = out // 32, out % 32 // 16, out % 16 // 8, out % 8
        for byte in range(num_in // 2):
            tile, half, group, quad = byte // 128, byte % 128 // 64, byte % 64 // 32, byte % 32 // 8
            step, side = byte % 8 // 2, byte % 2
            found = tiles[
                strip,
                tile,
                half * 2048 + m * 1024 + group * 512 + (row * 4 + quad) * 16 + step * 4 + side * 2 + eight,
            ]
            assert found == (packed[out, byte] if out < num_out else 0)
        for block in range(num_in // 64):
            found = tiles[strip, block // 4, 4096 + out % 32 * 4 + block % 4]
            assert found == (levels[out, block] if out < num_out else 0)


def make_layer(weight, block=64):
    num_out, num_in = weight.shape
    layer = bnb.nn.Linear4bit(num_in, num_out, bias=False, compute_dtype=weight.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=True, blocksize=block, module=layer
    ).to("cuda")
    return layer


def random_rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", torch.bfloat16)


def assert_near(found, x, weight, residual=None):
    """Tolerance: NF4's numbers, bitsandbytes' weights and the output are rounded to 2^-8 each."""
    assert found.dtype == torch.bfloat16
    adversarial.assert_near(found, x, weight, residual, eps=3 * 2.0**-8)


@pytest.fixture
def shared_bytes(request, monkeypatch):
    """Shared memory of a block and of a multiprocessor for which the kernels are compiled: this GPU's or another's."""
    from finlora.model.kernels import nf4_products

    if request.param is not None:
        monkeypatch.setattr(nf4_products, "_find_shared_bytes", lambda device: request.param)
        nf4_products._load.cache_clear()
    yield
    nf4_products._load.cache_clear()


@on_gpu
@pytest.mark.parametrize("shared_bytes", [None, (101376, 102400)], ids=["own", "A6000"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_rows", "num_out", "num_in"), SIZES)
def test_few_rows(num_rows, num_out, num_in, kind, shared_bytes):
    from finlora.model.kernels.nf4_products import few_nf4

    layer = make_layer(spoil(random_rows(num_out, num_in, seed=3), kind))
    plain = unpack_nf4(layer, torch.bfloat16).double()
    x, residual = spoil(random_rows(num_rows, num_in), kind), random_rows(num_rows, num_out, seed=1)
    tiles = take_tiles([layer])
    assert_near(few_nf4(x, tiles, None), x, plain)
    found = few_nf4(x, tiles, residual)
    assert_near(found, x, plain, residual)
    assert torch.equal(found, few_nf4(x, tiles, residual))  # parts are added in one order


@on_gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("num_out", "num_in"), [(192, 256), (1000, 4096), (520, 768), (40, 2560)])
def test_unpacked_numbers_are_those_of_bitsandbytes(num_out, num_in, kind):
    from finlora.model.kernels.nf4_products import unpack_tiles

    layer = make_layer(spoil(random_rows(num_out, num_in, seed=3), kind))
    plain = unpack_nf4(layer, torch.bfloat16)
    assert torch.equal(unpack_tiles(take_tiles([layer])).view(torch.int16), plain.view(torch.int16))


@on_gpu
@pytest.mark.parametrize("num_rows", [1, 7, 17, MAX_FEW_ROWS, MAX_FEW_ROWS + 1, 300])
@pytest.mark.parametrize("sizes", [(256, 64, 64), (264, 56, 64), (384,)], ids=["apart", "tiles of two", "one"])
def test_projections_of_one_input_side_by_side(num_rows, sizes):
    layers = [make_layer(random_rows(num_out, 2048, seed=number)) for number, num_out in enumerate(sizes)]
    plain = torch.cat([unpack_nf4(layer, torch.bfloat16) for layer in layers]).double()
    weight = freeze(layers, torch.bfloat16, consumes=True)
    assert isinstance(weight, TiledNf4Weight)
    assert all(layer.weight is None for layer in layers)
    x, residual, grad = random_rows(num_rows, 2048, seed=9), random_rows(num_rows, 384, seed=1), random_rows(3, 384)
    assert_near(weight.forward(x), x, plain)
    assert_near(weight.forward(x, residual), x, plain, residual)
    assert_near(weight.backward(grad), grad, plain.t())


@on_gpu
def test_layers_go_on_working_where_they_are_not_consumed():
    layers = [make_layer(random_rows(64, 256, seed=number)) for number in range(2)]
    plain = torch.cat([unpack_nf4(layer, torch.bfloat16) for layer in layers]).double()
    weight = freeze(layers, torch.bfloat16)
    assert isinstance(weight, Nf4Weight)
    x = random_rows(5, 256)
    assert_near(weight.forward(x), x, plain)
    assert_near(torch.cat([layer(x) for layer in layers], 1), x, plain)


@on_gpu
@pytest.mark.parametrize(("num_in", "block"), [(320, 64), (256, 128)], ids=["columns", "larger blocks"])
def test_blocks_that_do_not_fit_tiles_stay_as_they_are(num_in, block):
    layer = make_layer(random_rows(64, num_in), block)
    assert isinstance(freeze([layer], torch.bfloat16, consumes=True), Nf4Weight)


@on_gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_row_that_is_not_finite_gives_nothing_finite_and_leaves_the_others(bad):
    weight = TiledNf4Weight([make_layer(random_rows(128, 256, seed=3))])
    x = random_rows(5, 256)
    clean = weight.forward(x)
    x[2, 100] = bad
    found = weight.forward(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@on_gpu
def test_kernel_runs_in_a_thread_that_has_not_used_the_gpu():
    from concurrent.futures import ThreadPoolExecutor

    weight = TiledNf4Weight([make_layer(random_rows(128, 256, seed=3))])
    x = random_rows(5, 256)
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(weight.forward, x).result(), weight.forward(x))


@on_gpu
@pytest.mark.parametrize("num_rows", [1, 9, MAX_FEW_ROWS, MAX_FEW_ROWS + 1])
def test_gated_product_is_that_of_its_halves(num_rows):
    layers = [make_layer(random_rows(320, 512, seed=seed) * 0.05) for seed in range(2)]
    weight = freeze(layers, torch.bfloat16, consumes=True)
    x = random_rows(num_rows, 512)
    found, plain = multiply_gated(weight, x), gate(weight.forward(x))
    assert found.shape == (num_rows, 320)
    # exp in fewer digits, and each of three roundings may go the other way
    torch.testing.assert_close(found, plain, rtol=3 * 2.0**-8, atol=1e-5)


@on_gpu
def test_kernels_that_begin_early_read_nothing_too_early():
    from finlora.model.kernels.rms_norm import norm_rows

    gate_up = freeze(
        [make_layer(random_rows(2816, 1024, seed=n) * 0.03) for n in range(2)], torch.bfloat16, consumes=True
    )
    down = freeze([make_layer(random_rows(1024, 2816, seed=5) * 0.03)], torch.bfloat16, consumes=True)
    norm = random_rows(1024, seed=6)

    def run(x, settle):
        for _ in range(40):
            normed = settle(norm_rows(x, norm, 1e-5))
            x = settle(down.forward(settle(multiply_gated(gate_up, normed)), x))
        return x

    def settle(tensor):
        torch.cuda.synchronize()
        return tensor

    for num_rows in (1, 16, 40):
        x = random_rows(num_rows, 1024, seed=num_rows)
        expected = run(x, settle)  # compiled, and one kernel after the other
        assert torch.equal(run(x, lambda tensor: tensor), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run(x, lambda tensor: tensor)
        for _ in range(20):
            found.zero_()
            graph.replay()
            assert torch.equal(found, expected)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 64), (16, 4096), (64, 8192), (3, 5000)])
def test_norm_of_few_rows(num_rows, width, dtype):
    from finlora.model.kernels.rms_norm import norm_rows

    x, weight = random_rows(num_rows, width).to(dtype) * 3, random_rows(width, seed=1).to(dtype)
    wide = x.double()
    plain = (weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    eps = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(norm_rows(x, weight, 1e-5), plain, rtol=eps, atol=1e-6)


def describe_layer(num_out, num_in):
    """Return a stand-in of a 4-bit layer with its shape and block size."""
    state = SimpleNamespace(
        nested=True, blocksize=64, state2=SimpleNamespace(blocksize=256), absmax=range(num_out * num_in // 64)
    )
    return SimpleNamespace(weight=SimpleNamespace(quant_state=state), in_features=num_in, out_features=num_out)


@pytest.mark.parametrize(
    ("hidden", "inner", "key_value", "tiled"),
    [
        (576, 1536, 192, {"down"}),  # SmolLM2-135M: 576 is no multiple of 256
        (2048, 8192, 512, {"qkv", "out", "gate_up", "down"}),  # Llama 3.2 1B
        (3072, 8192, 1024, {"qkv", "out", "gate_up", "down"}),  # 3B
        (4096, 14336, 1024, {"qkv", "out", "gate_up", "down"}),  # 8B
        (8192, 28672, 1024, {"qkv", "out", "gate_up", "down"}),  # 70B
        (16384, 53248, 1024, {"qkv", "out", "gate_up", "down"}),  # 405B
    ],
)
def test_sizes_of_llamas_that_the_kernels_take(hidden, inner, key_value, tiled):
    products = {
        "qkv": [(hidden, hidden), (key_value, hidden), (key_value, hidden)],
        "out": [(hidden, hidden)],
        "gate_up": [(inner, hidden)] * 2,
        "down": [(hidden, inner)],
    }
    found = {name for name, shapes in products.items() if can_tile([describe_layer(*shape) for shape in shapes])}
    assert found == tiled
    most_rows = choose_batch_rows(1) + 4096  # plus rows of labels
    for shapes in products.values():
        num_out, num_in = sum(out for out, _ in shapes), shapes[0][1]
        # Triton's kernels of 8 bit count the numbers of each of their tensors in 31 bits.
        assert max(num_out * num_in, most_rows * num_in, most_rows * num_out) < 2**31
        assert num_out % 8 == num_in % 8 == 0  # as cuBLAS' int8 products need
