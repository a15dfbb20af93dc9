"""The packed forecast: bytes that a layer saves, and the plan for a given memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from emulated_flash import emulate_attention
from emulated_triton import emulated_kernels
from family_bases import write_family_base
from held_bytes import HeldBytes
from torch.utils._pytree import tree_leaves

from finlora.config import LoraConfig, ModelConfig, RunConfig, TrainConfig
from finlora.data.encode import Encoded
from finlora.data.pack_size import PackSize, measure_pack, pad_pack
from finlora.data.packing import pack_examples
from finlora.formula.llama import LLAMA_8B, LLAMA_70B, PROJECTION_NAMES, shape_of
from finlora.model.base import load_base
from finlora.model.layers.packed_layer import LayerContext, run_layer
from finlora.model.layers.packed_model import PackedLlama
from finlora.model.lora import attach_lora
from finlora.model.memory.packed_memory import (
    Workload,
    count_kept_bytes,
    count_pack_bytes,
    forecast_packs,
    plan_packs,
)

EXAMPLES = [Encoded(tuple(range(10, 40 + 3 * n)), tuple(range(200, 202 + n % 4))) for n in range(7)]


def make_run(base="base", targets=("q_proj", "k_proj", "v_proj"), **train):
    return RunConfig(
        model=ModelConfig(base=base, bits=16, compute_dtype="float32"),
        lora=LoraConfig(dropout=0.1, target_modules=targets),
        train=TrainConfig(device="cpu", precision="fp32", **train),
    )


@pytest.mark.parametrize("family", ["", "qwen3"])
@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), PROJECTION_NAMES, ("gate_proj", "down_proj")])
def test_layer_keeps_what_the_table_says(tiny_base, tmp_path, targets, recompute, family):
    base = write_family_base(family, tmp_path / "base", tiny_base) if family else tiny_base
    config = make_run(str(base), targets=targets)
    model = attach_lora(load_base(config.model, 16, torch.device("cpu"), 0).model, config.lora, str(base), 1)
    module = PackedLlama(model.train(), torch.float32, recompute=recompute)
    pack = pack_examples(EXAMPLES, share_prefix=True)
    llama = model.get_base_model()
    x = llama.model.embed_tokens(pack.input_ids)
    cosine, sine = (table[0] for table in llama.model.rotary_emb(x, pack.positions[None]))
    with torch.no_grad():
        context = LayerContext(pack.segments, None, cosine, sine, recompute)
        _, kept = run_layer(x, module.layers[0], context, module._derive_seeds(torch.tensor(5, dtype=torch.int32), 0))
    tensors = [value for value in tree_leaves(dataclasses.asdict(kept)) if value is not None]
    own = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert own == len(x) * count_kept_bytes(shape_of(llama.config.to_dict()), config, recompute)


def adapt_small(recompute, targets):
    """Return a packed model with Llama's proportions in bfloat16, and its config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    settings = LlamaConfig(hidden_size=256, intermediate_size=896, vocab_size=500, **sizes)
    net = LlamaForCausalLM(settings).requires_grad_(False).to(torch.bfloat16)
    lora = LoraConfig(rank=1, dropout=0.1, target_modules=targets)
    model = ModelConfig(bits=16, compute_dtype="bfloat16")
    config = RunConfig(model=model, lora=lora, train=TrainConfig(precision="bf16"))
    return PackedLlama(attach_lora(net, lora, None, 1).train(), torch.bfloat16, recompute=recompute), config


@pytest.mark.parametrize(
    ("targets", "recompute"),
    [
        (PROJECTION_NAMES[:3], "none"),
        *((PROJECTION_NAMES, recompute) for recompute in ("none", "mlp", "layer")),
        (("gate_proj", "o_proj"), "layer"),
    ],
)
def test_peak_of_a_step_is_what_torch_allocates(monkeypatch, targets, recompute):
    """With the GPU's kernels, emulated: their results are allocated as on a GPU. Left out are gradients and rotary tables."""
    module, config = adapt_small(recompute, targets)
    items = [Encoded(tuple(range(3 + n, 30 + n)), (200, 201)) for n in range(4)]
    pack, seed = pad_pack(pack_examples(items, share_prefix=False)), torch.tensor(5, dtype=torch.int32)
    emulate_attention(monkeypatch)
    with emulated_kernels(numbers=None), torch.no_grad(), HeldBytes() as held:
        module.loss_and_gradients(pack, seed)
    size, shape = (
        PackSize(num_rows=len(pack.input_ids), num_labels=len(pack.targets)),
        shape_of(module.model.config.to_dict()),
    )
    forecast = count_pack_bytes(shape, config, size, recompute, keep_unpacked=False)
    assert 1 < held.peak / forecast < 1.03


@pytest.mark.parametrize("share_prefix", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_size_is_known_before_the_pack_is_built(count, share_prefix):
    pack = pack_examples(EXAMPLES[:count], share_prefix=share_prefix)
    for is_padded, built in ((False, pack), (True, pad_pack(pack))):
        size = measure_pack(EXAMPLES[:count], share_prefix=share_prefix, is_padded=is_padded)
        assert size == PackSize(num_rows=len(built.input_ids), num_labels=len(built.targets))


def workload(longest=719, mean=1504, largest=4000):
    return Workload(
        longest=longest,
        mean_share=mean,
        largest_share=largest,
        measure=lambda tokens: PackSize(num_rows=min(tokens, largest), num_labels=64),
    )


def true_run(bits, **train):
    return RunConfig(model=ModelConfig(bits=bits), train=TrainConfig(global_batch_size=16, **train))


def test_forecast_grows_by_what_the_rows_keep():
    config = true_run(4)
    small, large = (
        forecast_packs(LLAMA_8B, config, PackSize(num_rows=n, num_labels=16), "none", keep_unpacked=False)
        for n in (4000, 5000)
    )
    kept = 31 * (2 * (3 * 4096 + 2 * 1024 + 4096 + 12) + 4 * 32 + 4 * 14336)  # written out from the module's table
    working = 2 * (4096 + 3 * 14336)
    assert (large.train_peak_gib - small.train_peak_gib) * 2**30 == pytest.approx(1000 * (kept + working), rel=1e-9)


@pytest.mark.parametrize(("shape", "memory"), [(LLAMA_8B, 46.1), (LLAMA_8B, 12.0), (LLAMA_8B, 8.0), (LLAMA_70B, 43.8)])
def test_plan_fits_the_memory_it_was_made_for(shape, memory):
    plan = plan_packs(shape, true_run(4), workload(), memory)
    assert plan.fits(memory)
    assert plan.memory.train_peak_gib <= memory
    assert plan.memory.load_peak_gib <= memory


def test_what_costs_least_is_tried_first():
    """Unpacked weights go first, then gate and up projection are computed again, then whole layers."""
    cases = [(LLAMA_8B, 46.0), (LLAMA_8B, 16.0), (LLAMA_8B, 7.5), (LLAMA_70B, 42.0)]
    plans = [plan_packs(shape, true_run(4), workload(), memory) for shape, memory in cases]
    ways = [(plan.keep_unpacked, plan.recompute) for plan in plans]
    assert ways == [(True, "none"), (False, "none"), (False, "mlp"), (False, "layer")]


def test_plan_that_cannot_fit_is_the_one_that_needs_least():
    plan = plan_packs(LLAMA_8B, true_run(4), workload(), 5.0)
    assert not plan.fits(5.0)
    assert (plan.keep_unpacked, plan.recompute, plan.max_tokens) == (False, "layer", 719)


def test_settings_leave_one_way():
    plan = plan_packs(LLAMA_8B, true_run(4, recompute="mlp", unpack_weights="never"), workload(), 1000.0)
    assert (plan.keep_unpacked, plan.recompute) == (False, "mlp")
