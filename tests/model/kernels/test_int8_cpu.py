"""int8 products on a CPU: exact on every processor, also if oneDNN saturates."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from finlora.model.kernels import int8_cpu

SIZES = [(32, 64, 64), (33, 40, 1500), (40, 8, 4096)]
HELD = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
"""Makes a processor with VNNI compute like one of 2013; oneDNN then saturates without torch's knowledge."""


def draw_int8(*shape):
    numbers = torch.randint(-127, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(shape[0]))
    numbers[0], numbers[1] = 127, -127
    return numbers


@pytest.fixture(autouse=True)
def untried():
    int8_cpu.has_exact_int8.cache_clear()
    yield
    int8_cpu.has_exact_int8.cache_clear()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("multiply", [int8_cpu.multiply_int8, int8_cpu.multiply_in_float32])
def test_product_is_exact(multiply, size):
    rows, outputs, columns = size
    x, weight = draw_int8(rows, columns), draw_int8(outputs, columns)
    assert torch.equal(multiply(x, weight), (x.long() @ weight.long().t()).int())


def test_processor_that_saturates_is_detected_and_reported_once(monkeypatch, caplog):
    """As oneDNN's AVX2 kernels: x is shifted to 0 to 255, and pairs of products are added in int16."""

    def saturate(x, other):
        pairs = ((x.int() + 128)[:, :, None] * other.int()[None]).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1).int() - 128 * other.int().sum(0)[None].int()

    monkeypatch.setattr(torch, "_int_mm", saturate)
    x, weight = draw_int8(32, 64), draw_int8(16, 64)
    for _ in range(2):
        assert torch.equal(int8_cpu.multiply_int8(x, weight), (x.long() @ weight.long().t()).int())
    assert [record.message for record in caplog.records] == [
        "This CPU's int8 products saturate, as ONEDNN_MAX_CPU_ISA or a CPU without VNNI makes them: 8 bit is computed in float32 "
        "instead, exactly."
    ]


def test_slow_exact_product_is_not_taken(monkeypatch):
    """As with torch's own loops on a processor without VNNI."""
    seconds = iter([2.0, 1.0])
    monkeypatch.setattr(int8_cpu, "_time", lambda run: next(seconds))
    assert not int8_cpu.has_exact_int8()


def test_frozen_weight_is_the_same_on_a_processor_held_to_avx2():
    """LLM.int8() in its own process: oneDNN reads its limit once."""
    code = (
        "import torch; from finlora.model.layers.frozen_linear import Int8Weight;"
        "torch.manual_seed(0); x = torch.randn(40, 256); values = torch.randint(-127, 128, (96, 256), dtype=torch.int8);"
        "found = Int8Weight((values, torch.linspace(0.1, 2, 96)), torch.float32).forward(x);"
        "expected = x @ (values.float() * torch.linspace(0.1, 2, 96)[:, None] / 127).t();"
        "assert (found - expected).abs().max() < 0.02 * expected.abs().max(), (found, expected)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | HELD, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
