"""Loading tensor by tensor equals transformers' loader with bitsandbytes, bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from finlora.config import ModelConfig
from finlora.errors import ModelError
from finlora.model.base import load_base, measure_weights, quiet_bitsandbytes

CPU = torch.device("cpu")
IDS = torch.arange(60).reshape(3, 20) + 5


@pytest.fixture(scope="module")
def bases(tiny_base, tmp_path_factory):
    """The tiny base as one file with tied embeddings, an untied one in shards like Llama 8B, and one whose config ties them while
    the file holds a separate output head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sharded = tmp_path_factory.mktemp("models") / "untied"
    torch.manual_seed(3)
    config = LlamaConfig.from_pretrained(str(tiny_base), tie_word_embeddings=False)
    net = LlamaForCausalLM(config).to(torch.bfloat16)
    net.save_pretrained(str(sharded), max_shard_size="60KB")
    for path in tiny_base.glob("tokenizer*"):
        shutil.copy(path, sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    own_head = shutil.copytree(tiny_base, tmp_path_factory.mktemp("models") / "own-head")
    tensors = load_file(own_head / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"]) * 0.3
    save_file(tensors, own_head / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((own_head / "config.json").read_text())["tie_word_embeddings"] is True
    return {"tied": tiny_base, "untied-sharded": sharded, "own-head": own_head}


def load(folder, bits, dtype="bfloat16", seed=0, **settings):
    return load_base(ModelConfig(base=str(folder), compute_dtype=dtype, **settings), bits, CPU, seed)


def load_with_transformers(folder, bits):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantisation = {
        16: None,
        8: BitsAndBytesConfig(load_in_8bit=True),
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    }[bits]
    return AutoModelForCausalLM.from_pretrained(
        str(folder), quantization_config=quantisation, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("kind", ["tied", "untied-sharded", "own-head"])
def test_weights_and_logits_equal_transformers_bit_for_bit(bases, kind, bits):
    with quiet_bitsandbytes(), torch.inference_mode():
        ours, theirs = load(bases[kind], bits).model, load_with_transformers(bases[kind], bits).eval()
        weights, expected = dict(ours.named_parameters()), dict(theirs.named_parameters())
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert weight.dtype == expected[name].dtype, name
            assert torch.equal(weight, expected[name]), name
        assert torch.equal(ours(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(("bits", "layer"), [(16, "Linear"), (8, "Linear8bitLt"), (4, "Linear4bit")])
def test_bits_choose_the_layers_and_leave_the_head_whole(bases, bits, layer):
    base = load(bases["untied-sharded"], bits)
    kinds = {
        name.split(".")[-1]: type(m).__name__ for name, m in base.model.named_modules() if hasattr(m, "in_features")
    }
    assert {kinds[name] for name in ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")} == {layer}
    assert kinds["lm_head"] == "Linear"
    assert base.model.lm_head.weight.dtype == base.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert base.bits == bits


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_every_parameter_is_frozen_and_the_model_in_eval_mode(tiny_base, bits):
    model = load(tiny_base, bits).model
    assert [name for name, parameter in model.named_parameters() if parameter.requires_grad] == []
    assert not any(module.training for module in model.modules())
    assert [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta] == []


def test_tied_head_is_the_embedding_itself(bases):
    tied, untied = load(bases["tied"], 4).model, load(bases["untied-sharded"], 4).model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_float32_keeps_the_stored_values(tiny_base):
    stored = load_file(tiny_base / "model.safetensors")
    model = load(tiny_base, 16, dtype="float32").model
    for name, tensor in stored.items():
        assert torch.equal(model.get_parameter(name), tensor.float()), name


def test_weights_gib_counts_codes_and_scales(bases):
    """Computed by hand: hidden 64, intermediate 128, 2 layers, 512 tokens, head size 16 with 2 key-value heads."""
    embedding, norms = 512 * 64, 64 * 5
    linear = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    rows = 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64)
    inverse_frequencies = 2 * 8 * 4  # rotary buffers, float32: in use, and as first computed
    outside = 2 * (2 * embedding + norms) + inverse_frequencies
    assert load(bases["untied-sharded"], 16).weights_gib * 2**30 == outside + 2 * linear
    assert load(bases["untied-sharded"], 8).weights_gib * 2**30 == outside + linear + 4 * rows
    four = load(bases["untied-sharded"], 4)
    num_blocks, num_matrices = linear // 64, 14
    # NF4: half a byte a weight, a byte a block of 64 and, for each matrix, 16 + 256 codes and one second-level scale
    # for each 256 blocks.
    assert four.weights_gib * 2**30 == outside + linear / 2 + num_blocks + num_matrices * 4 * (16 + 256 + 1)
    assert load(bases["tied"], 16).weights_gib * 2**30 == outside - 2 * embedding + 2 * linear


def test_measured_weights_of_a_plain_module_are_its_bytes():
    assert measure_weights(nn.Linear(3, 5, dtype=torch.float32)) == 4 * (3 * 5 + 5)


def test_random_weights_follow_the_seed_alone(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))

    def weights(seed, bits=16):
        return dict(load(folder, bits, weights="random", seed=seed).model.named_parameters())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.layers.0.mlp.up_proj.weight"], other["model.layers.0.mlp.up_proj.weight"])
    assert torch.equal(first["model.norm.weight"], torch.ones(64, dtype=torch.bfloat16))
    assert first["model.layers.0.mlp.up_proj.weight"].float().std() == pytest.approx(0.02, rel=0.1)
    assert load(folder, 16, weights="random").weights_hash == "random"


def test_base_tells_hash_of_weights_and_tokenizer(bases):
    tied, untied = load(bases["tied"], 4), load(bases["untied-sharded"], 4)
    assert tied.weights_hash != untied.weights_hash
    assert tied.tokenizer_hash == untied.tokenizer_hash
    assert (tied.revision, tied.load_peak_gib) == (None, None)


def test_missing_tensor_is_refused_with_a_message(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no tensor model.layers.1.mlp.up_proj.weight: its config.json describes"):
        load(folder, 4)


def test_tensor_of_another_shape_is_refused_with_a_message(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(ModelError, match=r"mlp.gate_proj.weight as \[128, 64\] where config.json says \[256, 64\]"):
        load(folder, 16)


def test_tokenizer_larger_than_the_embedding_is_refused_with_a_message(tiny_base, tmp_path):
    folder = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    with pytest.raises(
        ModelError, match=r"the tokenizer has 512 tokens but the model embeds 500: model.tokenizer does not"
    ):
        load(folder, 16, weights="random")
