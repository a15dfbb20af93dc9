"""A merged model answers like base and adapter, loads without FinLoRA, and is written completely or not at all."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from finlora.config import LoraConfig, ModelConfig
from finlora.data.encode import encode_prompt
from finlora.errors import AdapterError, ModelError, ResourceError
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.base_files import read_base_files
from finlora.model.contract import make_contract, write_contract
from finlora.model.lora import attach_lora, load_adapter, save_adapter, trainable_parameters
from finlora.model.merge import dequantise_base, export_merged, merge_lora

CPU = torch.device("cpu")
IDS = torch.arange(60).reshape(3, 20) + 5


def settings_of(folder, dtype="float32"):
    return ModelConfig(base=str(folder), compute_dtype=dtype)


@pytest.fixture
def make_adapter(tiny_base, tmp_path):
    """Write an adapter folder with its contract, as a training at the given bits does."""

    def make(bits=16, dtype="float32", lora=None, base_folder=tiny_base, template="raw", date=None):
        lora = lora or LoraConfig(rank=4)
        folder = tmp_path / f"adapter-{bits}"
        with quiet_bitsandbytes():
            base = load_base(settings_of(base_folder, dtype), bits, CPU, 0)
            model = attach_lora(base.model, lora, base.model.name_or_path, 1)
            torch.manual_seed(7)
            for parameter in trainable_parameters(model).values():
                parameter.data = (torch.randn_like(parameter) * 0.05).bfloat16().to(parameter.dtype)
            size = save_adapter(model, folder)
        write_contract(folder, make_contract(base, "tiny", lora, template, {"synthetic": "0" * 16}, 10, size, {}, date))
        return folder

    return make


def logits_of(net):
    with torch.inference_mode():
        return net(IDS).logits.float()


# float32: only the sums are rounded. bfloat16: W is rounded to 8 bits after the sum, which propagates to the logits.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj"), ("o_proj", "down_proj")])
def test_merged_logits_equal_adapter_logits(tiny_base, make_adapter, dtype, tolerance, targets):
    folder = make_adapter(dtype=dtype, lora=LoraConfig(rank=4, target_modules=targets))
    base = load_base(settings_of(tiny_base, dtype), 16, CPU, 0)
    before = logits_of(base.model)
    expected = logits_of(load_adapter(load_base(settings_of(tiny_base, dtype), 16, CPU, 0).model, folder))
    assert merge_lora(base, folder) == len(targets) * 2
    merged = logits_of(base.model)
    scale = expected.abs().max()
    assert (expected - before).abs().max() > 0.05 * scale  # the adapter has an effect
    assert (merged - expected).abs().max() < tolerance * scale


# 4 bit: a product uses the weights that are read back, so only sums are rounded. 8 bit: it also rounds activations to int8.
@pytest.mark.parametrize(("bits", "tolerance"), [(4, 1e-5), (8, 0.02)])
def test_merge_onto_dequantised_weights_is_the_forward_pass_of_the_training(tiny_base, make_adapter, bits, tolerance):
    folder = make_adapter(bits, lora=LoraConfig(rank=4, dropout=0.0))
    with quiet_bitsandbytes():
        model = load_adapter(load_base(settings_of(tiny_base), bits, CPU, 0).model, folder)
        trained = logits_of(model.train())  # in eval mode bitsandbytes computes in bfloat16 on some CPUs
        base = dequantise_base(load_base(settings_of(tiny_base), bits, CPU, 0))
    merge_lora(base, folder)
    plain = load_base(settings_of(tiny_base), 16, CPU, 0)
    merge_lora(plain, folder)
    scale = trained.abs().max()
    assert (logits_of(base.model) - trained).abs().max() < tolerance * scale
    if bits == 4:  # onto the base's own weights it is another model
        assert (logits_of(plain.model) - trained).abs().max() > 0.02 * scale


def test_folder_of_a_dequantised_merge_says_so_and_loads_without_finlora(tiny_base, make_adapter, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, output = make_adapter(4), tmp_path / "merged"
    merged = export_merged(settings_of(tiny_base), folder, output, CPU, allow_other_bits=False, onto="dequantised")
    assert (merged.trained_bits, merged.num_tensors) == (4, 6)
    record = yaml.safe_load((output / "merged.yaml").read_text())
    assert record["onto"] == "dequantised"
    assert record["weights"] == "NF4, double quantisation as in training, read back to 16 bit"
    with quiet_bitsandbytes():
        expected = logits_of(load_adapter(load_base(settings_of(tiny_base), 4, CPU, 0).model, folder))
    plain = AutoModelForCausalLM.from_pretrained(str(output), dtype=torch.float32)
    assert plain.config.to_dict().get("quantization_config") is None
    assert (logits_of(plain) - expected).abs().max() < 0.02 * expected.abs().max()  # rounded to bfloat16 once


def test_adapter_of_a_16_bit_base_has_nothing_to_read_back(tiny_base, make_adapter, tmp_path):
    words = r"was trained on a 16-bit base, so there are no quantised weights to read back: leave --onto out\."
    with pytest.raises(AdapterError, match=words):
        export_merged(
            settings_of(tiny_base), make_adapter(), tmp_path / "m", CPU, allow_other_bits=False, onto="dequantised"
        )


def test_weight_is_the_formula_in_float32_rounded_once(tiny_base, make_adapter):
    folder = make_adapter(dtype="bfloat16", lora=LoraConfig(rank=4, alpha=8))
    base = load_base(settings_of(tiny_base, "bfloat16"), 16, CPU, 0)
    layer = base.model.model.layers[1].self_attn.k_proj
    before = layer.weight.detach().clone()
    merge_lora(base, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.self_attn.k_proj.lora_"
    update = tensors[f"{prefix}B.weight"].float() @ tensors[f"{prefix}A.weight"].float()
    assert torch.equal(layer.weight, (before.float() + 2.0 * update).bfloat16())


@pytest.mark.parametrize("bits", [8, 4])
def test_merge_into_a_quantised_base_is_refused(tiny_base, make_adapter, bits):
    folder = make_adapter()
    with quiet_bitsandbytes():
        base = load_base(settings_of(tiny_base), bits, CPU, 0)
    with pytest.raises(ModelError, match=rf"loaded at {bits} bit, a merge needs 16.*bits=16"):
        merge_lora(base, folder)


@pytest.mark.parametrize("bits", [8, 4])
def test_adapter_of_other_bits_needs_an_explicit_choice(tiny_base, make_adapter, tmp_path, bits):
    folder, output = make_adapter(bits), tmp_path / "merged"
    with pytest.raises(AdapterError, match=rf"{bits}-bit base.*--allow-other-bits"):
        export_merged(settings_of(tiny_base), folder, output, CPU, allow_other_bits=False)
    assert not output.exists()
    merged = export_merged(settings_of(tiny_base), folder, output, CPU, allow_other_bits=True)
    assert (merged.trained_bits, merged.num_tensors) == (bits, 6)


def test_folder_reads_as_a_plain_model_and_says_where_it_comes_from(tiny_base, make_adapter, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, output = make_adapter(), tmp_path / "models" / "merged"
    export_merged(settings_of(tiny_base), folder, output, CPU, allow_other_bits=False)
    expected = logits_of(load_adapter(load_base(settings_of(tiny_base), 16, CPU, 0).model, folder))
    assert (
        AutoModelForCausalLM.from_pretrained(str(output)).dtype == torch.bfloat16
    )  # although the run computes in float32
    plain = AutoModelForCausalLM.from_pretrained(str(output), dtype=torch.float32)
    # The sum is rounded to bfloat16 once; the weights' rounding, 1 / 256, propagates to the logits.
    assert (logits_of(plain) - expected).abs().max() < 0.02 * expected.abs().max()
    assert (logits_of(load_base(settings_of(output), 16, CPU, 0).model) - logits_of(plain)).abs().max() == 0
    assert len(AutoTokenizer.from_pretrained(str(output))) <= plain.config.vocab_size
    provenance = yaml.safe_load((output / "merged.yaml").read_text())
    assert provenance["dtype"] == "bfloat16"
    assert provenance["contract"]["bits"] == 16
    assert [path.name for path in output.parent.iterdir()] == ["merged"]
    assert str(tmp_path) not in (output / "config.json").read_text()


def test_head_of_the_bases_own_is_in_the_merged_folder(tiny_base, make_adapter, tmp_path):
    """The base's config ties head and embedding, its file does not; the merged config follows the file."""
    from transformers import AutoModelForCausalLM

    base = shutil.copytree(tiny_base, tmp_path / "base")
    tensors, head = load_file(base / "model.safetensors"), torch.full((512, 64), 0.5, dtype=torch.bfloat16)
    save_file(tensors | {"lm_head.weight": head}, base / "model.safetensors", metadata={"format": "pt"})
    folder = make_adapter(base_folder=base)
    export_merged(settings_of(base), folder, tmp_path / "merged", CPU, allow_other_bits=False)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is False
    plain = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"))
    assert torch.equal(plain.lm_head.weight, head)
    assert torch.equal(plain.model.embed_tokens.weight, tensors["model.embed_tokens.weight"])


def test_merged_folder_writes_the_date_of_the_training_for_any_reader(dated_base, make_adapter, tmp_path, pretend_day):
    from transformers import AutoTokenizer

    folder = make_adapter(base_folder=dated_base, template="chat", date="2025-03-09")
    settings = dataclasses.replace(settings_of(dated_base), template="chat")
    export_merged(settings, folder, tmp_path / "merged", CPU, allow_other_bits=False)
    pretend_day("2026-11-30")
    turns = [{"role": "user", "content": "Profit rose"}]
    text = AutoTokenizer.from_pretrained(str(tmp_path / "merged")).apply_chat_template(turns, tokenize=False)
    assert text == "<|begin_of_text|>Today Date: 09 Mar 2025\n\n[user] Profit rose\n"
    # As a base, its template no longer asks the clock.
    merged = read_base_files(dataclasses.replace(settings_of(tmp_path / "merged"), template="chat"))
    assert merged.template_date is None
    assert encode_prompt("Profit rose", merged.tokenizer, "chat") == encode_prompt(
        "Profit rose", read_base_files(settings).tokenizer, "chat", "2025-03-09"
    )


def test_adapter_of_another_base_is_refused_before_the_base_is_loaded(dated_base, make_adapter, tmp_path, monkeypatch):
    monkeypatch.setattr("finlora.model.merge.load_base", None)
    folder = make_adapter()
    settings = dataclasses.replace(settings_of(dated_base), template="chat")
    words = r"does not fit here: tokenizer hash is .*; template is chat, trained with raw"
    with pytest.raises(AdapterError, match=words):
        export_merged(settings, folder, tmp_path / "merged", CPU, allow_other_bits=False)


def test_adapter_and_merged_model_have_the_modes_of_the_umask(tiny_base, make_adapter, tmp_path, file_mode):
    """A server under another account must be able to read weights and JSON."""
    folder, output = make_adapter(), tmp_path / "merged"
    export_merged(settings_of(tiny_base), folder, output, CPU, allow_other_bits=False)
    modes = {path.name: path.stat().st_mode & 0o777 for parent in (folder, output) for path in parent.iterdir()}
    assert {"adapter_model.safetensors", "model.safetensors", "config.json", "finlora.yaml"} <= modes.keys()
    assert set(modes.values()) == {file_mode}
    assert output.stat().st_mode == folder.stat().st_mode


def test_other_base_is_refused(tiny_base, make_adapter, tmp_path):
    folder = make_adapter()
    contract = yaml.safe_load((folder / "finlora.yaml").read_text()) | {"weights_hash": "f" * 16}
    del contract["sha256"]  # as the error message advises
    (folder / "finlora.yaml").write_text(yaml.safe_dump(contract))
    with pytest.raises(AdapterError, match=r"weights hash is .*, trained with ffff"):
        export_merged(settings_of(tiny_base), folder, tmp_path / "merged", CPU, allow_other_bits=False)
    assert not (tmp_path / "merged").exists()


def test_full_output_folder_is_left_alone(tiny_base, make_adapter, tmp_path):
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not empty"):
        export_merged(settings_of(tiny_base), make_adapter(), tmp_path / "merged", CPU, allow_other_bits=False)
    assert (tmp_path / "merged" / "notes.txt").read_text() == "mine"


def test_failed_write_leaves_nothing(tiny_base, make_adapter, tmp_path, monkeypatch):
    folder = make_adapter()

    def fail(*_args, **_settings):
        raise OSError("disk full")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_merged(settings_of(tiny_base), folder, tmp_path / "out" / "merged", CPU, allow_other_bits=False)
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("change", [{"use_dora": "yes"}, {"use_rslora": "yes"}, {"rank_pattern": {"0.*q_proj": 8}}])
def test_other_formulas_than_plain_lora_are_refused(tiny_base, make_adapter, change):
    folder = make_adapter()
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(AdapterError, match=f"is not plain LoRA.*{next(iter(change))}"):
        merge_lora(load_base(settings_of(tiny_base), 16, CPU, 0), folder)


def test_tensor_of_another_shape_is_refused_before_any_weight_changes(tiny_base, make_adapter):
    folder = make_adapter()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(name for name in tensors if name.endswith("v_proj.lora_B.weight"))[-1]
    tensors[name] = torch.zeros(3, 4, dtype=torch.bfloat16)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    base = load_base(settings_of(tiny_base), 16, CPU, 0)
    before = logits_of(base.model)
    with pytest.raises(
        AdapterError, match=r"v_proj as \[3, 4\] x \[4, 64\], the base's is 32 x 64: it was made for another base"
    ):
        merge_lora(base, folder)
    assert torch.equal(logits_of(base.model), before)


def test_cut_adapter_file_is_refused(tiny_base, make_adapter):
    folder = make_adapter()
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(AdapterError, match="is not a complete safetensors file"):
        merge_lora(load_base(settings_of(tiny_base), 16, CPU, 0), folder)


def test_disk_without_room_is_refused_before_the_base_is_loaded(tiny_base, make_adapter, tmp_path, monkeypatch):
    folder = make_adapter()
    monkeypatch.setattr("finlora.model.merge.load_base", lambda *_args, **_settings: pytest.fail("it was loaded"))
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: SimpleNamespace(free=2**20))
    with pytest.raises(
        ResourceError, match=r"has 0\.0 GiB free, and the merged model takes 0\.0: free disk space, or choose"
    ):
        export_merged(settings_of(tiny_base), folder, tmp_path / "merged", CPU, allow_other_bits=False)
