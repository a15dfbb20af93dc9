"""Adapters: the formula by hand, PEFT's own loader on our files, the paper's file sizes, and errors by words."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finlora.config import LoraConfig, ModelConfig
from finlora.errors import AdapterError
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.lora import attach_lora, load_adapter, save_adapter, trainable_parameters

CPU = torch.device("cpu")
IDS = torch.arange(40).reshape(2, 20) + 5


def load(folder, bits=16, dtype="float32"):
    return load_base(ModelConfig(base=str(folder), compute_dtype=dtype), bits, CPU, 0).model


def attach(net, seed=1, **settings):
    return attach_lora(net, LoraConfig(**settings), net.name_or_path or None, seed)


def fill(model, std=0.1):
    """Give every B a value, as training does; bf16 holds the values exactly, so that saving loses nothing."""
    torch.manual_seed(7)
    for parameter in trainable_parameters(model).values():
        parameter.data = (torch.randn_like(parameter) * std).bfloat16().to(parameter.dtype)


@pytest.fixture
def saved(tiny_base, tmp_path):
    """A model with a filled adapter, and its saved folder."""
    model = attach(load(tiny_base), rank=4).eval()
    fill(model)
    save_adapter(model, tmp_path / "adapter")
    return model, tmp_path / "adapter"


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_fresh_adapter_leaves_the_output_as_it_was(tiny_base, bits):
    with quiet_bitsandbytes(), torch.inference_mode():
        base = load(tiny_base, bits)
        before = base(IDS).logits
        after = attach(base).eval()(IDS).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_only_lora_is_trainable_in_float32_on_the_named_projections(tiny_base, bits):
    model = attach(load(tiny_base, bits, dtype="bfloat16"), rank=4)
    parameters = trainable_parameters(model)
    assert len(parameters) == 2 * 3 * 2
    assert {name.split(".")[-4] for name in parameters} == {"q_proj", "k_proj", "v_proj"}
    assert {name.split(".")[-3] for name in parameters} == {"lora_A", "lora_B"}
    assert {parameter.dtype for parameter in parameters.values()} == {torch.float32}
    assert all((p == 0).all() for name, p in parameters.items() if "lora_B" in name)
    assert all((p != 0).any() for name, p in parameters.items() if "lora_A" in name)


def test_adapter_start_follows_the_seed(tiny_base):
    starts = [trainable_parameters(attach(load(tiny_base), seed)) for seed in (1, 1, 2)]
    name = next(name for name in starts[0] if "lora_A" in name)
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize(("rank", "alpha"), [(4, 32.0), (8, 32.0), (2, 3.0)])
def test_update_is_alpha_over_rank_times_b_a(tiny_base, rank, alpha):
    base = load(tiny_base)
    weight = base.model.layers[1].self_attn.v_proj.weight.clone()
    model = attach(base, rank=rank, alpha=alpha, dropout=0.5).eval()
    fill(model)
    layer = model.get_base_model().model.layers[1].self_attn.v_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (tuple(a.shape), tuple(b.shape)) == ((rank, 64), (32, rank))
    x = torch.randn(3, 64)
    with torch.inference_mode():
        expected = x @ (weight + alpha / rank * b @ a).T
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_saved_adapter_opens_in_peft_with_equal_logits(tiny_base, tmp_path, bits):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    with quiet_bitsandbytes(), torch.inference_mode():
        model = attach(load(tiny_base, bits), rank=4).eval()
        fill(model)
        save_adapter(model, tmp_path / "adapter")
        own = model(IDS).logits
        without = load(tiny_base, bits)(IDS).logits
        quantisation = {
            16: None,
            8: BitsAndBytesConfig(load_in_8bit=True),
            4: BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            ),
        }[bits]
        plain = AutoModelForCausalLM.from_pretrained(
            str(tiny_base), dtype=torch.float32, quantization_config=quantisation, device_map={"": "cpu"}
        )
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(IDS).logits
        ours = load_adapter(load(tiny_base, bits), tmp_path / "adapter")(IDS).logits
    assert (own - without).abs().max() > 0.1
    torch.testing.assert_close(theirs, own, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-5)


def test_saving_leaves_two_files_in_bf16_and_training_can_go_on(saved):
    model, folder = saved
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert sorted(path.name for path in folder.parent.iterdir()) == ["adapter"]
    assert {tensor.dtype for tensor in load_file(folder / "adapter_model.safetensors").values()} == {torch.bfloat16}
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == (4, 32.0, "LORA")
    assert settings["inference_mode"] is True
    assert model.peft_config["default"].inference_mode is False
    assert {parameter.dtype for parameter in trainable_parameters(model).values()} == {torch.float32}


def test_loaded_adapter_is_frozen_and_of_the_bases_type(saved, tiny_base):
    model = load_adapter(load(tiny_base, dtype="bfloat16"), saved[1])
    assert trainable_parameters(model) == {}
    assert not model.training
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("layers", "hidden", "intermediate", "heads", "rank", "mib"),
    [(32, 4096, 14336, 32, 4, 4.5), (32, 4096, 14336, 32, 8, 9.0), (80, 8192, 28672, 64, 4, 21.3)],
    ids=["8B-r4", "8B-r8", "70B-r4"],
)
def test_adapter_file_has_the_papers_size(tmp_path, layers, hidden, intermediate, heads, rank, mib):
    """The true shapes of Llama 3.1; the base is on the meta device, so only the adapter takes memory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        net = LlamaForCausalLM(config)
    model = attach(net, rank=rank)
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad:
                setattr(module, leaf, torch.nn.Parameter(torch.zeros(parameter.shape)))
    size = save_adapter(model, tmp_path / "adapter")
    assert size == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size / 2**20
    assert size == pytest.approx(mib, abs=0.06)


def test_missing_files_are_refused_with_a_message(saved, tiny_base, tmp_path):
    with pytest.raises(AdapterError, match=r"absent has no adapter_config.json: expected an adapter folder"):
        load_adapter(load(tiny_base), tmp_path / "absent")
    (saved[1] / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors"):
        load_adapter(load(tiny_base), saved[1])


def test_cut_weights_are_refused_with_a_message(saved, tiny_base):
    path = saved[1] / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match=r"is not a complete safetensors file"):
        load_adapter(load(tiny_base), saved[1])


def test_base_of_another_width_is_refused_with_a_message(saved, tiny_base, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(str(tiny_base), hidden_size=32, num_attention_heads=2)
    with pytest.raises(
        AdapterError, match=r"q_proj as \[64, 4\] x \[4, 64\], the base's is 32 x 32: it was made for another base"
    ):
        load_adapter(LlamaForCausalLM(config), saved[1])


@pytest.mark.filterwarnings("ignore")  # pytest's filter must not raise the error
@pytest.mark.parametrize("lost", ["lora_A", "layers.1."])
def test_weights_without_some_tensors_are_refused_with_a_message(saved, tiny_base, lost):
    """PEFT initialises missing tensors and only warns: that would be another adapter."""
    path = saved[1] / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if lost not in name}, path)
    with pytest.raises(AdapterError, match=r"lacks 6 of the 12 tensors"):
        load_adapter(load(tiny_base), saved[1])


def test_failed_save_leaves_the_old_adapter(saved, monkeypatch):
    import safetensors.torch

    model, folder = saved
    before = (folder / "adapter_model.safetensors").read_bytes()

    def full_disk(*_arguments, **_settings):
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    fill(model, std=0.5)
    with pytest.raises(OSError, match=r"No space left"):
        save_adapter(model, folder)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_adapter_folder_can_be_copied_and_loaded_anywhere(saved, tiny_base, tmp_path):
    moved = shutil.copytree(saved[1], tmp_path / "elsewhere" / "copy")
    with torch.inference_mode():
        assert torch.equal(load_adapter(load(tiny_base), moved)(IDS).logits, saved[0](IDS).logits)
