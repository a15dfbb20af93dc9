"""Adapters of a stage: only its own layers are read, and files that are not plain LoRA of this base are refused."""

from __future__ import annotations

import json
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from finlora.errors import AdapterError
from finlora.model.base import load_base
from finlora.model.lora import load_adapter
from finlora.model.merge import merge_lora
from finlora.model.source import find_source
from finlora.stage.adapter_weights import Bank, read_adapter

CPU = torch.device("cpu")


@pytest.fixture
def read(four_layers):
    shape = find_source(four_layers).shape
    return lambda folder, span=range(4): read_adapter(folder, shape, span, torch.float32, CPU, None)


@pytest.fixture
def copy(adapter_folders, tmp_path):
    """Copy an adapter's folder, for a test to damage."""
    return lambda name: shutil.copytree(adapter_folders[name], tmp_path / name)


def test_updates_equal_the_tensors_of_the_file(read, adapter_folders):
    adapter = read(adapter_folders["all"])
    tensors = load_file(adapter_folders["all"] / "adapter_model.safetensors")
    assert len(adapter) == 4 * 4
    update = adapter[2, "qkv"][1]  # of k
    prefix = "base_model.model.model.layers.2.self_attn.k_proj"
    assert torch.equal(update.down, tensors[f"{prefix}.lora_A.weight"].float())
    assert torch.equal(update.up, tensors[f"{prefix}.lora_B.weight"].float())
    assert (update.columns, update.scale) == (slice(64, 96), 8.0)
    assert {key: len(updates) for key, updates in adapter.items() if key[0] == 0} == {
        (0, "qkv"): 3,
        (0, "out"): 1,
        (0, "gate_up"): 2,
        (0, "down"): 1,
    }


def test_stage_reads_only_its_own_layers(read, adapter_folders):
    assert sorted({layer for layer, _ in read(adapter_folders["few"], range(1, 3))}) == [1, 2]
    assert {product for _, product in read(adapter_folders["few"])} == {"qkv"}


def test_adapter_of_another_base_is_refused(read, copy):
    folder = copy("few")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name][:-8].clone()}, path)
    with pytest.raises(
        AdapterError, match=r"v_proj as \[24, 4\] x \[4, 64\], the base's is 32 x 64: it was made for another"
    ):
        read(folder)
    extra = {key.replace("layers.3.", "layers.9."): tensor for key, tensor in tensors.items()}
    save_file(extra, path)
    with pytest.raises(AdapterError, match=r"6 tensors that no layer of the base takes, such as .*layers.9"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors, _: {k: v for k, v in tensors.items() if "layers.3." not in k}, r"lacks 6 of the 24 tensors"),
        (lambda tensors, more: tensors | more, r"2 tensors that no layer of the base takes, such as .*o_proj"),
        (lambda tensors, more: more, r"2 tensors that no layer of the base takes, such as .*o_proj"),
        (lambda *_: {}, r"lacks 24 of the 24 tensors"),
    ],
    ids=["too few", "too many", "other tensors", "none"],
)
def test_stage_merge_and_peft_refuse_the_same_files(read, copy, four_layers, change, words):
    folder = copy("few")
    path = folder / "adapter_model.safetensors"
    prefix = "base_model.model.model.layers.0.self_attn.o_proj.lora_"
    more = {f"{prefix}A.weight": torch.ones(4, 64), f"{prefix}B.weight": torch.ones(64, 4)}
    save_file(change(load_file(path), more), path)
    base = load_base(four_layers, 16, CPU, 0)
    for load in (read, partial(merge_lora, base), partial(load_adapter, base.model)):
        with pytest.raises(AdapterError, match=words):
            load(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": "yes"}, "is not plain LoRA \\(use_dora='yes'\\)"),
        ({"use_dora": True}, "lacks .* tensors .*lora_magnitude_vector"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"0.*q_proj": 8}}, "rank_pattern="),
        ({"rank_pattern": {"q_proj": 7}}, r"expected lora_A \(7, in\)"),
    ],
)
def test_other_variants_than_plain_lora_are_refused(read, copy, settings, words):
    folder = copy("few")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(AdapterError, match=words):
        read(folder)


def test_damaged_or_missing_files_are_refused(read, copy, tmp_path):
    with pytest.raises(AdapterError, match=r"has no adapter_config.json: expected an adapter folder"):
        read(tmp_path / "absent")
    folder = copy("few")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"has no adapter_model.safetensors"):
        read(folder)


def test_bank_has_a_row_for_each_adapter_even_without_an_update(read, adapter_folders):
    bank, sizes = Bank(), {"qkv": 128, "out": 64, "gate_up": 256, "down": 64}
    for number, name in enumerate(("all", "few", "few", "few", "few"), start=1):
        bank.add(f"a{number}", read(adapter_folders[name]), sizes)
    x, out = torch.ones(6, 64), torch.zeros(6, 64)
    changed = bank.apply(out, x, torch.arange(6), 0, "out").count_nonzero(dim=1) > 0
    assert changed.tolist() == [False, True, False, False, False, False]
