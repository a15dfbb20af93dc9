"""A Llama's parameters without transformers' forward pass: the same names, sizes, rotary tables and stages."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from finlora.config import ModelConfig
from finlora.formula.bare_llama import BareLlama, Rotary
from finlora.model.base import load_base, quiet_bitsandbytes

CPU = torch.device("cpu")
ROPES = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def make_config(kind="default", **settings):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **ROPES[kind]}
    return LlamaConfig(
        vocab_size=50,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=rope,
        **settings,
    )


@pytest.mark.parametrize("settings", [{}, {"head_dim": 16}])
def test_parameters_have_transformers_names_and_sizes(settings):
    config = make_config(**settings)
    with torch.device("meta"):
        whole = LlamaForCausalLM(config)
    bare = BareLlama(config, torch.bfloat16)
    own = {name: parameter.shape for name, parameter in bare.named_parameters()}
    assert own == {name: parameter.shape for name, parameter in whole.named_parameters()}
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in bare.parameters())
    for name, module in whole.named_modules():
        if hasattr(module, "variance_epsilon"):
            assert bare.get_submodule(name).variance_epsilon == module.variance_epsilon


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", sorted(ROPES))
def test_rotary_tables_are_transformers(kind, dtype):
    config, x, positions = make_config(kind), torch.zeros(1, dtype=dtype), torch.arange(0, 250, 3)[None]
    expected = LlamaRotaryEmbedding(config)(x, positions)
    for own, other in zip(Rotary(config)(x, positions), expected, strict=True):
        assert own.dtype == other.dtype
        assert torch.equal(own, other)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bare_base_holds_the_weights_of_the_whole_one(tiny_base, bits):
    model = ModelConfig(base=str(tiny_base))
    with quiet_bitsandbytes():
        whole, bare = (load_base(model, bits, CPU, 0, is_bare=flag) for flag in (False, True))
    assert isinstance(bare.model, BareLlama)
    expected = whole.model.state_dict()
    found = bare.model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert bare.weights_gib == pytest.approx(whole.weights_gib, abs=1e-6)  # transformers keeps its frequencies twice


def test_stage_imports_neither_transformers_models_nor_torchs_compiler(tiny_base):
    """Each takes longer than a small base to load; torch imports its compiler at the first torch.compile."""
    program = (
        "import sys, torch\n"
        "from finlora.config import ModelConfig\n"
        "from finlora.model.base import load_base\n"
        "from finlora.stage.stage import Stage\n"
        "compile_ = torch.compile\n"
        "for bits in (8, 4):\n"
        f"    base = load_base(ModelConfig(base={str(tiny_base)!r}), bits, torch.device('cpu'), 0, is_bare=True)\n"
        "    Stage(base.model, range(2), 16, base.dtype)\n"
        "assert torch.compile is compile_\n"
        "found = {'torch._inductor', 'torch._dynamo', 'transformers.modeling_utils', 'peft'} & set(sys.modules)\n"
        "print(sorted(found))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout.splitlines()[-1] == "[]"
