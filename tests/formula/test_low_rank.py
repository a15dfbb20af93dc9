"""Record of LoRA compared with PEFT's adapter: names, shapes, scale and settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from finlora.config import LoraConfig
from finlora.formula.llama import PROJECTION_NAMES, shape_of
from finlora.formula.low_rank import (
    foreign_settings,
    list_adapter_tensors,
    list_sites,
    peft_settings,
    rank_axis,
    read_module,
    read_settings,
)
from finlora.model.lora import attach_lora

LORA = LoraConfig(rank=3, alpha=7.0, dropout=0.25, target_modules=PROJECTION_NAMES)


@pytest.fixture(scope="module")
def model():
    """A model that PEFT adapted on every projection."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=16,
    )
    return attach_lora(LlamaForCausalLM(config), LORA, None, 0)


@pytest.mark.parametrize("targets", [PROJECTION_NAMES, ("v_proj", "down_proj")])
def test_tensors_have_the_names_and_shapes_of_pefts_file(model, targets):
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model)
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items() if name.split(".")[-3] in targets}
    assert len(theirs) == 2 * 2 * len(targets)
    shape = shape_of(model.get_base_model().config.to_dict())
    assert dict(list_adapter_tensors(shape, dataclasses.replace(LORA, target_modules=targets).settings)) == theirs
    assert {name for site in list_sites(shape, targets) for name in site.names} == theirs.keys()
    assert all(size[rank_axis(name)] == LORA.rank for name, size in theirs.items())
    assert rank_axis("base_model.model.lm_head.weight") is None


def test_settings_read_back_what_peft_was_given(model):
    settings = model.peft_config["default"].to_dict()
    assert foreign_settings(settings) == {}
    given = peft_settings(LORA.settings, LORA.dropout)
    assert {key: set(settings[key]) if key == "target_modules" else settings[key] for key in given} == given | {
        "target_modules": set(PROJECTION_NAMES)
    }
    read = read_settings(settings)
    assert (read.rank, read.alpha, set(read.target_modules)) == (3, 7.0, set(PROJECTION_NAMES))


def test_update_is_what_peft_adds(model):
    site = list(list_sites(shape_of(model.get_base_model().config.to_dict()), PROJECTION_NAMES))[9]
    module = model.get_base_model().get_submodule(site.projection.path(site.layer))
    module.lora_B["default"].weight.data.normal_(generator=torch.Generator().manual_seed(1))
    update = read_module(
        module, site.columns, read_settings(model.peft_config["default"].to_dict()).scale_of(site.projection.name)
    )
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        added = module.eval()(x) - module.base_layer(x)
        torch.testing.assert_close(update.scale * (x @ update.down.t()) @ update.up.t(), added)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": "yes"},
        {"lora_bias": True},
        {"alpha_pattern": {"layers.0.q_proj": 2}},
        {"rank_pattern": {"q_proj": 0}},
    ],
)
def test_variant_that_the_record_does_not_describe_is_foreign(model, changes):
    assert foreign_settings(model.peft_config["default"].to_dict() | changes) == changes
