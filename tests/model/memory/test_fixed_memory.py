"""The forecast against the paper's table, the sizes of files and weights, and every byte that torch allocates."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from held_bytes import HeldBytes
from torch import nn

from finlora.config import LoraConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from finlora.data.encode import Batch
from finlora.formula.llama import LLAMA_8B, LLAMA_70B, LlamaShape, shape_of
from finlora.model.base import load_base, measure_weights, quiet_bitsandbytes
from finlora.model.lora import attach_lora, save_adapter, trainable_parameters
from finlora.model.memory.fixed_memory import (
    GIB,
    count_adapter_file_bytes,
    count_adapter_parameters,
    count_load_peak_bytes,
    count_optimizer_bytes,
    count_weight_bytes,
)
from finlora.model.memory.padded_memory import (
    PaddedBatch,
    count_saved_bytes,
    count_step_peak_bytes,
    find_worst_micro_batch,
    plan_memory,
)
from finlora.optim.optimizer import make_optimizer
from finlora.train.steps.loop import AnswerLoss

CPU = torch.device("cpu")
# A small model with Llama's proportions: grouped queries, and an MLP of 3.5 times the width.
SHAPE = LlamaShape(
    hidden_size=256, intermediate_size=896, num_layers=3, num_heads=8, num_kv_heads=2, head_dim=32, vocab_size=1000
)
B, T, LABELS_A_ROW = 4, 64, 4


class CudaDropout(nn.Module):
    """Dropout as CUDA runs it, with a byte mask; the CPU's keeps a mask of the input's type."""

    def forward(self, x):
        return torch.native_dropout(x, 0.1, True)[0]


@pytest.fixture(scope="module")
def load_random(tiny_base, tmp_path_factory):
    """Build a base of a shape with random weights."""

    def load(shape, bits, **changes):
        folder = tmp_path_factory.mktemp("shape")
        (folder / "config.json").write_text(json.dumps(config_of(shape) | changes))
        config = ModelConfig(base=str(folder), tokenizer=str(tiny_base), weights="random", compute_dtype="bfloat16")
        return load_base(config, bits, CPU, 0).model

    return load


def config_of(shape):
    return {
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.is_tied,
    }


@pytest.mark.parametrize(
    ("shape", "bits", "paper_gib"),
    [
        (LLAMA_8B, 16, 15.0),
        (LLAMA_8B, 8, 8.6),
        (LLAMA_8B, 4, 5.6),
        (LLAMA_70B, 16, 131.5),
        (LLAMA_70B, 8, 68.5),
        (LLAMA_70B, 4, 37.8),
    ],
)
def test_weights_stay_at_or_below_the_papers_inference_memory(shape, bits, paper_gib):
    weights = count_weight_bytes(shape, bits) / GIB
    assert 0.94 * paper_gib < weights <= paper_gib


def test_parameters_of_the_published_models():
    assert count_weight_bytes(LLAMA_8B, 16) == 2 * 8_030_261_248 + 512
    assert count_weight_bytes(LLAMA_70B, 16) == 2 * 70_553_706_496 + 512


@pytest.mark.parametrize("shape", [SHAPE, dataclasses.replace(SHAPE, is_tied=True)])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_weights_equal_what_loading_measures(load_random, shape, bits):
    num_quantised = 7 * shape.num_layers
    offsets = 4 * num_quantised if bits == 4 else 0  # measure_weights leaves out a scalar a layer
    assert count_weight_bytes(shape, bits) == measure_weights(load_random(shape, bits)) + offsets


def test_load_peak_is_the_final_size_where_the_head_comes_last_and_a_tensor_more_where_it_does_not():
    assert count_load_peak_bytes(LLAMA_8B, 4) == count_weight_bytes(LLAMA_8B, 4)
    tied = dataclasses.replace(LLAMA_8B, is_tied=True)
    tensor = LLAMA_8B.intermediate_size * LLAMA_8B.hidden_size
    extra = count_load_peak_bytes(tied, 8) - count_weight_bytes(tied, 8)
    assert 0.99 * 4 * tensor < extra <= 4 * tensor  # bfloat16 and float16 of down_proj, less the norms that come after


@pytest.mark.parametrize(("shape", "lora_rank", "mib"), [(LLAMA_8B, 4, 4.5), (LLAMA_8B, 8, 9.0), (LLAMA_70B, 4, 21.3)])
def test_adapter_file_has_the_papers_size(shape, lora_rank, mib):
    assert count_adapter_file_bytes(shape, LoraConfig(rank=lora_rank)) / 2**20 == pytest.approx(mib, abs=0.05)


@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("o_proj", "down_proj")])
def test_adapter_file_and_parameters_are_exact(load_random, tmp_path, targets):
    shape = dataclasses.replace(SHAPE, num_layers=12)  # layers 10 and 11 sort before 2
    lora = LoraConfig(rank=4, target_modules=targets)
    net = load_random(shape, 16)
    model = attach_lora(net, lora, net.name_or_path, 0)
    save_adapter(model, tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert count_adapter_file_bytes(shape, lora) == size
    assert count_adapter_parameters(shape, lora) == sum(p.numel() for p in trainable_parameters(model).values())


def test_adamw_state_is_exact(load_random):
    lora = LoraConfig(rank=4)
    net = load_random(SHAPE, 16)
    parameters = list(trainable_parameters(attach_lora(net, lora, net.name_or_path, 0)).values())
    optimizer = make_optimizer(parameters, OptimConfig(name="adamw"), 10)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = [t for s in optimizer.state.values() for t in s.values() if t.ndim > 0]  # without the step counters
    held = sum(t.nbytes for t in [*state, *(p.grad for p in parameters)])
    assert count_optimizer_bytes(SHAPE, lora, "adamw", 4) == held


def test_zero_one_adam_holds_six_vectors_a_byte_mask_and_a_share():
    lora = LoraConfig(rank=4)
    num = count_adapter_parameters(LLAMA_8B, lora)  # every tensor fills whole blocks of 512
    assert count_optimizer_bytes(LLAMA_8B, lora, "zero_one_adam", 4) == num * (6 * 4 + 1 + 1)
    assert count_optimizer_bytes(LLAMA_8B, lora, "zero_one_adam", 4, parameter_bytes=2) == num * (6 * 4 + 4 - 2 + 1 + 1)


STEPS = [({}, *step) for step in product((16, 8, 4), (False, True), (True, False))]
STEPS += [({"model_type": "qwen3"}, *step) for step in product((16, 4), (False, True), (True,))]
STEPS += [({"model_type": "granite", "residual_multiplier": 0.2, "attention_bias": True}, 16, False, True)]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(("family", "bits", "checkpointing", "is_padded"), STEPS)
def test_activations_match_every_byte_that_a_step_holds(load_random, family, bits, checkpointing, is_padded):
    with quiet_bitsandbytes():
        net = load_random(SHAPE, bits, **family)
        shape = shape_of(net.config.to_dict())
        model = attach_lora(net, LoraConfig(rank=4), net.name_or_path, 0)
        for module in model.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = CudaDropout()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        module = AnswerLoss(model.train())
        input_ids = torch.randint(0, SHAPE.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
        mask = torch.ones(B, T, dtype=torch.long)
        if is_padded:
            mask[1:, 50:] = 0
        labels = torch.full((B, T), -100)
        labels[:, 40 : 40 + LABELS_A_ROW] = 5
        for _ in range(2):  # gradients exist from the second step on
            held = HeldBytes()
            with held:
                with torch.autocast("cpu", torch.bfloat16):
                    loss = module(Batch(input_ids, mask, labels, B * T))
                saved = held.now
                loss.backward()
    config = RunConfig(model=ModelConfig(bits=bits), train=TrainConfig(gradient_checkpointing=checkpointing))
    batch = PaddedBatch(num_examples=B, num_tokens=T, num_labels=B * LABELS_A_ROW, is_padded=is_padded)
    assert count_saved_bytes(shape, config, batch, 2) == pytest.approx(saved, rel=0.002)
    assert count_step_peak_bytes(shape, config, batch, 2) == pytest.approx(held.peak, rel=0.005)


def test_checkpointing_saves_most_at_4_bit_and_less_at_8():
    batch = PaddedBatch(num_examples=16, num_tokens=276, num_labels=64, is_padded=True)

    def activations(bits, checkpointing):
        config = RunConfig(model=ModelConfig(bits=bits), train=TrainConfig(gradient_checkpointing=checkpointing))
        return plan_memory(LLAMA_8B, config, batch).activations_gib

    assert activations(4, True) < 0.1 * activations(4, False)
    assert 0.2 < activations(8, True) / activations(8, False) < 0.4


def test_plan_adds_up():
    batch = PaddedBatch(num_examples=1, num_tokens=300, num_labels=4, is_padded=False)
    plan = plan_memory(LLAMA_8B, RunConfig(), batch)
    parts = plan.weights_gib + plan.adapter_gib + plan.optimizer_gib + plan.activations_gib
    assert plan.train_peak_gib == pytest.approx(parts)
    assert plan.total_gib == pytest.approx(parts + 1.3)
    assert plan.adapter_file_mib == pytest.approx(4.52, abs=0.01)


def test_worst_micro_batch_pads_to_the_longest_example_and_bounds_the_labels():
    lengths = [(100, 3), (719, 2), (80, 9), (90, 1)]
    assert find_worst_micro_batch(lengths, 2) == PaddedBatch(
        num_examples=2, num_tokens=719, num_labels=12, is_padded=True
    )
    assert find_worst_micro_batch(lengths, 1) == PaddedBatch(
        num_examples=1, num_tokens=719, num_labels=9, is_padded=False
    )
    assert find_worst_micro_batch(lengths, 16).num_examples == 4


def test_shape_is_read_from_transformers_config():
    from transformers import LlamaConfig

    assert shape_of(LlamaConfig.from_dict(config_of(LLAMA_8B)).to_dict()) == LLAMA_8B


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_benchmark_measures_a_small_case_on_cpu():
    path = Path(__file__).resolve().parents[3] / "benchmarks" / "memory.py"
    spec = importlib.util.spec_from_file_location("memory_benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, benchmark)  # dataclasses look their module up
        spec.loader.exec_module(benchmark)
        case = benchmark.parse_case("tiny-4bit-r4-2x32-ckpt")
        measured, plan = benchmark.measure_case(case, "cpu"), benchmark.forecast_case(case)
    assert measured["weights_gib"] == pytest.approx(plan.weights_gib, rel=1e-3)
    assert measured["adapter_file_mib"] == plan.adapter_file_mib
    assert measured["loss"] > 0
    assert measured["train_peak_gib"] is None
