"""Micro-batches on CPU padded to few row counts: the same results and cache, and few sizes of products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from random_batches import micro_batches

from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.stage.row_padding import compiles_by_rows, count_padding
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
CACHE_ROWS = 9216


@pytest.mark.parametrize(("num_rows", "padded"), [(0, 0), (1, 1), (3, 4), (9, 16), (17, 32), (512, 512), (1541, 1568)])
def test_size_is_rounded_up(num_rows, padded):
    assert num_rows + count_padding(num_rows) == padded


def test_there_are_few_sizes_and_little_padding():
    sizes = [count + count_padding(count) for count in range(1, 12289)]
    assert len(set(sizes)) < 220
    assert all(count_padding(count) < max(16, count / 32) for count in range(1, 12289))
    assert sizes == sorted(sizes)


@pytest.fixture(scope="module", params=[("first stage", 16), ("last stage", 16), ("last stage", 8)], ids=str)
def stage(request, four_layers, adapter_folders):
    """Two of four layers at some bits, with both adapters."""
    which, bits = request.param
    span = range(2) if which == "first stage" else range(2, 4)
    with quiet_bitsandbytes():
        stage = Stage(load_base(four_layers, bits, CPU, 0, span).model, span, CACHE_ROWS, torch.float32)
    for name, folder in adapter_folders.items():
        stage.load_adapter(name, folder)
    return stage


def run(stage, batch, *, pads):
    """Run a micro-batch; returns the result, the cache, and the row counts of the products."""
    generator = torch.Generator().manual_seed(0)
    stage.cache.copy_(torch.randn(stage.cache.shape, generator=generator))
    hidden = None if stage.is_first else torch.randn(batch.num_rows, 64, generator=generator)
    sizes, forward = set(), stage.layers[0].qkv.forward

    def note(x, *rest):
        sizes.add(len(x))
        return forward(x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_pads", pads)
        patch.setattr(stage.layers[0].qkv, "forward", note)
        result = stage.run(batch, hidden)
    if stage.is_last:
        output = result.read()
        result = torch.tensor([*(number for pair in output.tokens for number in pair), *output.log_probs])
    return result.clone(), stage.cache[:, :, :-1].clone(), sizes


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(batch=micro_batches(4096))
def test_padding_changes_no_result(stage, batch):
    expected, cache, _ = run(stage, batch, pads=False)
    found, padded_cache, sizes = run(stage, batch, pads=True)
    assert sizes == {batch.num_rows + count_padding(batch.num_rows)}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded_cache, cache, rtol=1e-4, atol=1e-4)


def test_only_bfloat16_on_cpu_is_padded(four_layers):
    for dtype, pads in ((torch.float32, False), (torch.bfloat16, True)):
        stage = Stage(load_base(four_layers, 16, CPU, 0).model, range(4), 64, dtype)
        assert stage._pads == pads
    assert not compiles_by_rows(torch.device("cuda"), torch.bfloat16)
