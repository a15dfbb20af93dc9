"""Variants of LoRA on every path against PEFT: rsLoRA, ranks and alphas of single projections."""

from __future__ import annotations

import pytest
import torch
from test_families import CPU, EXAMPLES, assert_near, gradients_of, run_plain, run_stages

from finlora.config import LoraConfig, ModelConfig
from finlora.data.encode import collate
from finlora.data.packing import pack_examples
from finlora.errors import ConfigError
from finlora.formula.llama import PROJECTION_NAMES, shape_of
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.layers.packed_model import PackedLlama
from finlora.model.lora import attach_lora, load_adapter, save_adapter, trainable_parameters
from finlora.model.memory.fixed_memory import count_adapter_file_bytes, count_adapter_parameters
from finlora.model.merge import merge_lora
from finlora.train.steps.loop import AnswerLoss

PATTERNS = {"rank_pattern": {"down_proj": 5, "k_proj": 2}, "alpha_pattern": {"o_proj": 3.0, "k_proj": 20.0}}
VARIANTS = {
    "rslora": {"rslora": True},
    "patterns": PATTERNS,
    "both": {"rslora": True, **PATTERNS},
}


@pytest.fixture
def make_adapted(tiny_base):
    def build(variant, bits=16, dropout=0.0):
        with quiet_bitsandbytes():
            net = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), bits, CPU, 0).model
        lora = LoraConfig(rank=3, alpha=7.0, dropout=dropout, target_modules=PROJECTION_NAMES, **VARIANTS[variant])
        model = attach_lora(net, lora, str(tiny_base), 1)
        torch.manual_seed(5)
        for parameter in trainable_parameters(model).values():
            parameter.data = torch.randn_like(parameter) * 0.1
        return model, lora

    return build


@pytest.mark.parametrize("variant", VARIANTS)
def test_scales_and_ranks_are_pefts(make_adapted, variant):
    model, lora = make_adapted(variant)
    settings, layer = lora.settings, model.get_base_model().model.layers[1]
    for name, block in (
        ("q_proj", "self_attn"),
        ("k_proj", "self_attn"),
        ("o_proj", "self_attn"),
        ("down_proj", "mlp"),
    ):
        module = layer.get_submodule(f"{block}.{name}")
        assert module.scaling["default"] == pytest.approx(settings.scale_of(name), rel=1e-12)
        assert module.r["default"] == settings.rank_of(name)
    parameters = trainable_parameters(model).values()
    shape = shape_of(model.get_base_model().config.to_dict())
    assert count_adapter_parameters(shape, lora) == sum(parameter.numel() for parameter in parameters)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("bits", "recompute"), [(16, "none"), (4, "mlp"), (4, "layer")])
def test_packed_gradients_equal_pefts(make_adapted, variant, bits, recompute):
    model, _ = make_adapted(variant, bits)
    expected = gradients_of(model.train(), AnswerLoss(model), collate(EXAMPLES, 2))
    own = gradients_of(
        model, PackedLlama(model, torch.float32, recompute=recompute), pack_examples(EXAMPLES, share_prefix=True)
    )
    assert own[0] == pytest.approx(expected[0], rel=1e-5)
    # rsLoRA's scale is larger than LoRA's, and so is the share of float32's rounding: 1.7e-5 on a CPU with AVX2 alone.
    assert_near(own[1], expected[1], 3e-5 if variant == "rslora" else 1e-5)


def test_projections_of_different_ranks_have_the_same_masks_in_both_passes(make_adapted):
    model, _ = make_adapted("patterns", dropout=0.2)
    found = []
    for recompute in ("none", "mlp", "layer"):
        torch.manual_seed(0)
        module = PackedLlama(model.train(), torch.float32, recompute=recompute)
        found.append(gradients_of(model, module, pack_examples(EXAMPLES, share_prefix=True)))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert_near(gradients, found[0][1], 1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_served_and_merged_adapter_equal_pefts(make_adapted, tiny_base, variant, tmp_path):
    model, lora = make_adapted(variant)
    save_adapter(model.eval(), tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert size == count_adapter_file_bytes(shape_of(model.get_base_model().config.to_dict()), lora)
    settings = ModelConfig(base=str(tiny_base), compute_dtype="float32")
    adapted = load_adapter(load_base(settings, 16, CPU, 0).model, tmp_path / "adapter")
    expected = run_plain(adapted)
    merged = load_base(settings, 16, CPU, 0)
    assert merge_lora(merged, tmp_path / "adapter") == 2 * len(PROJECTION_NAMES)
    assert_near(run_plain(merged.model), expected)
    assert_near(run_plain(adapted.merge_and_unload()), expected)
    assert_near(run_stages(settings, 2, adapter=tmp_path / "adapter"), expected)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"rank_pattern": {"o_proj": 4}},
            r"rank_pattern has o_proj: expected some of lora.target_modules \(q_proj, k_proj, v_proj\)",
        ),
        ({"rank_pattern": {"q_proj": 0}}, r"rank_pattern\[q_proj\]=0: expected an integer of 1 to 4,096"),
        ({"alpha_pattern": {"q_proj": -1.0}}, r"alpha_pattern\[q_proj\]=-1.0: expected a number above 0, below"),
    ],
)
def test_pattern_that_means_nothing_is_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        LoraConfig(**values)
