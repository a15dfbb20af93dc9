"""Split of layers into stages of equal cost, including the output head."""

from __future__ import annotations

import pytest

from finlora.errors import ConfigError
from finlora.formula.llama import LLAMA_8B, LLAMA_70B, LlamaShape
from finlora.pipeline.split_layers import split_layers

HEAD_8B = 2 * 128256 * 4096
LAYER_8B = 2 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 14336)


@pytest.mark.parametrize("shape", [LLAMA_8B, LLAMA_70B])
@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 8])
def test_spans_hold_every_layer_once_and_in_order(shape, bits, num_stages):
    spans = split_layers(shape, bits, num_stages)
    assert len(spans) == num_stages
    assert [layer for span in spans for layer in span] == list(range(shape.num_layers))


def test_last_stage_has_fewer_layers_for_its_head():
    """At 16 bit the head of 8B costs 2.4 layers: with 9, 9, 8 and 6 layers the slowest stage costs 9, with 8 each 10.4."""
    assert pytest.approx(2.41, abs=0.01) == HEAD_8B / LAYER_8B
    assert [len(span) for span in split_layers(LLAMA_8B, 16, 4)] == [9, 9, 8, 6]
    assert [len(span) for span in split_layers(LLAMA_8B, 16, 1)] == [32]
    # At 4 bit the layers are lighter and the head is not.
    assert len(split_layers(LLAMA_8B, 4, 4)[-1]) < 6


def test_quantised_layers_are_not_lighter_on_a_cpu():
    """SmolLM2-135M's head has the weights of 8 layers. A split by bytes at 4 bit would give the first stage 29 of 30 layers; on a
    CPU it took 1.7 times as long as with these 17. The measured cost of the head was 1.6 to 7 layers."""
    shape = LlamaShape(
        hidden_size=576,
        intermediate_size=1536,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        vocab_size=49152,
        is_tied=True,
    )
    for bits, sizes in ((16, [19, 11]), (8, [17, 13]), (4, [17, 13])):
        assert [len(span) for span in split_layers(shape, bits, 2, "cpu")] == sizes
    assert [len(span) for span in split_layers(shape, 4, 2)] == [29, 1]
    assert split_layers(shape, 16, 2, "cpu") == split_layers(shape, 16, 2)


def test_one_layer_per_stage():
    assert [len(span) for span in split_layers(LLAMA_8B, 16, 32)] == [1] * 32


@pytest.mark.parametrize("num_stages", [0, 33])
def test_impossible_number_of_stages_is_refused(num_stages):
    with pytest.raises(ConfigError, match=rf"found {num_stages} stages for 32 decoder layers: expected 1 to 32"):
        split_layers(LLAMA_8B, 16, num_stages)
