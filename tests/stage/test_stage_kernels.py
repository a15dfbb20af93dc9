"""A whole stage with all of its GPU kernels emulated on CPU: padded, captured and replayed passes against float32."""

from __future__ import annotations

import json
import shutil
from itertools import product

import pytest
import torch
from emulated_flash import emulate_flash
from emulated_graphs import emulate_graphs
from emulated_triton import emulated_kernels
from random_batches import add_request

from finlora.config import ModelConfig
from finlora.engine.micro_batch import MicroBatch
from finlora.inference.in_process import InProcess
from finlora.inference.open_base import warm_up
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.kernels import launch
from finlora.stage.decode_graphs import PROMPT_SIZES
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
_BY_128 = {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 1}
SHAPES = {
    # SmolLM2-135M: only the MLP's 1,536 is a multiple of 128; three query heads per key-value head
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    "by 128": _BY_128,
    "narrow heads": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 12, "num_key_value_heads": 4},
    # Norms of heads and biases; and factors and biases of a family, and a layer without rotary embedding
    "qwen3": {**_BY_128, "model_type": "qwen3", "attention_bias": True},
    "granite": {
        **_BY_128,
        "model_type": "granite",
        "attention_bias": True,
        "mlp_bias": True,
        "attention_multiplier": 0.05,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 3.0,
    },
    "smollm3": {**_BY_128, "model_type": "smollm3", "no_rope_layers": [0]},
}


@pytest.fixture(scope="module")
def make_stage(tiny_base, tmp_path_factory):
    """Factory of one-layer stages of a shape, first and last in one; all weights are random."""

    def build(shape, bits, dtype, cache_rows=512):
        folder = tmp_path_factory.mktemp("shape") / "base"
        shutil.copytree(tiny_base, folder)
        (folder / "model.safetensors").unlink()
        values = json.loads((folder / "config.json").read_text()) | SHAPES[shape]
        values |= {"num_hidden_layers": 1, "initializer_range": 0.05}
        values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        (folder / "config.json").write_text(json.dumps(values))
        with quiet_bitsandbytes():
            base = load_base(ModelConfig(base=str(folder), weights="random", compute_dtype="float32"), bits, CPU, 0)
            torch.manual_seed(0)
            for name, parameter in base.model.named_parameters():
                if name.endswith(("q_norm.weight", "k_norm.weight")):
                    parameter.uniform_(0.5, 1.5)
            return Stage(base.model, range(1), cache_rows, dtype)

    return build


def make_batches():
    tokens = MicroBatch(0, adapters=[(None, 3)])
    for start, cached in ((0, 70), (80, 3), (96, 20)):
        add_request(tokens, "token", start, cached, 1, [])
    prompts = MicroBatch(0)
    add_request(prompts, "token", 0, 70, 1, [])
    add_request(prompts, "chunk", 80, 9, 75, [])
    labels = MicroBatch(0)
    add_request(labels, "labels", 0, 5, 20, [2, 1, 3])
    for batch in (prompts, labels):
        batch.adapters.append((None, batch.num_rows))
    return {"tokens": tokens, "prompts": prompts, "labels": labels}


def run(stage, batch):
    stage.is_last = False  # it returns hidden states
    generator = torch.Generator().manual_seed(0)
    stage.cache.copy_(torch.randn(stage.cache.shape, generator=generator))
    return stage.run(batch, None).float().clone()


TYPES = (torch.bfloat16, torch.float32)
CASES = [*product([shape for shape in SHAPES if "model_type" not in SHAPES[shape]], (16, 8), TYPES)]
CASES += [("qwen3", 8, torch.bfloat16), ("granite", 8, torch.bfloat16), ("smollm3", 16, torch.bfloat16)]


@pytest.mark.parametrize(("shape", "bits", "dtype"), CASES)
def test_stage_with_kernels_equals_the_plain_one(make_stage, monkeypatch, shape, bits, dtype):
    batches = make_batches()
    plain = make_stage(shape, bits, torch.float32)
    truth = {name: run(plain, batch) for name, batch in batches.items()}
    # At 8 bit the plain product rounds its input to int8; the kernel for few rows does not.
    most = 0.05 if bits == 8 else 0.02 if dtype == torch.bfloat16 else 1e-5
    emulate_graphs(monkeypatch)
    emulate_flash(monkeypatch, is_whole=False)
    monkeypatch.setattr(launch, "takes_kernels", lambda _tensor: True)
    with emulated_kernels() as kernels:
        stage = make_stage(shape, bits, dtype)
        assert stage.passes.fills == (dtype == torch.bfloat16)  # FlashAttention takes no float32
        stage.passes.captures = True
        for name, batch in batches.items():
            for way in ("eager", "captured", "replayed"):
                found = run(stage, batch)
                error = float((found - truth[name]).norm() / truth[name].norm())
                assert error < most, (name, way)
        assert len(stage.passes._graphs) == (3 if stage.passes.fills else 0)
        launched = {name for name in vars(kernels) for kernel in vars(vars(kernels)[name]).values() if is_used(kernel)}
    width = stage.layers[0].heads[2]
    expected = {"rms_norm", "norm_steps", "elementwise_steps"} | ({"write_kv"} if width >= 16 else set())
    if bits == 8:
        expected.add("int8_steps")
    if width >= 16 and dtype == torch.bfloat16:
        expected.add("decode_attention")
    if bits == 8 and shape != "narrow heads":
        expected |= {"int8_decode", "int8_prefill"}
    assert launched == expected


@pytest.mark.parametrize(("cache_rows", "batch_tokens"), [(64, 16), (512, 300)])
def test_warm_up_captures_every_form_of_requests_without_adapters(make_stage, monkeypatch, cache_rows, batch_tokens):
    """As on a GPU, for the smallest allowed cache and for a larger one."""
    emulate_graphs(monkeypatch)
    emulate_flash(monkeypatch, is_whole=False)
    monkeypatch.setattr(launch, "takes_kernels", lambda _tensor: True)
    with emulated_kernels():
        stage = make_stage("narrow heads", 16, torch.bfloat16, cache_rows)
        stage.passes.captures = True
        warm_up(InProcess([stage]), cache_rows, batch_tokens)
    captured = set(stage.passes._graphs)
    for count in (1, 3, 24, 64):
        batch = MicroBatch(0, adapters=[(None, count)])
        for number in range(count):
            add_request(batch, "token", number, 0, 1, [])
        assert stage.passes.take(batch).form in captured
    sizes = [size for size in PROMPT_SIZES if size < min(cache_rows, batch_tokens)]
    for num_rows, answers in product(sizes, ([], [1], [1] * 4)):
        batch = MicroBatch(0)
        add_request(batch, "labels", 0, 0, num_rows - sum(answers), answers)
        batch.adapters.append((None, batch.num_rows))
        assert stage.passes.take(batch).form in captured, (num_rows, answers)


def is_used(kernel):
    return bool(getattr(kernel, "launches", ()))
