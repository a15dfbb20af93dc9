"""Files of a base model: anything but a complete Llama in safetensors is refused with a message before loading."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finlora.config import ModelConfig
from finlora.errors import ModelError, ResourceError
from finlora.model.base import check_device
from finlora.model.source import find_source, fingerprint_weights


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base for a test to damage."""
    return shutil.copytree(tiny_base, tmp_path / "base")


@pytest.fixture
def sharded(base):
    """The tiny base in two shards with an index."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, base / file)
        weight_map |= dict.fromkeys(part, file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return base


def find(folder, **settings):
    return find_source(ModelConfig(base=str(folder), **settings))


def edit(path, **changes):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | changes))


def test_single_file_and_shards_name_every_tensor(base, tmp_path, sharded, tiny_base):
    source, whole = find(sharded), find(tiny_base)
    assert source.shards.keys() == whole.shards.keys()
    assert {path.name for path in whole.shards.values()} == {"model.safetensors"}
    assert len(set(source.shards.values())) == 2
    assert source.revision is None
    assert source.tokenizer_path == sharded
    assert find(sharded, tokenizer=str(tmp_path)).tokenizer_path == tmp_path


def test_random_weights_need_no_weight_file(base):
    (base / "model.safetensors").unlink()
    source = find(base, weights="random")
    assert source.shards == {}
    assert fingerprint_weights(source) == "random"


def test_other_architecture_is_refused_with_a_message(base):
    edit(base / "config.json", model_type="gemma3_text")
    words = r"is a 'gemma3_text' model: FinLoRA runs model_type llama, mistral, qwen2, qwen3, smollm3, granite, .* another base"
    with pytest.raises(ModelError, match=words):
        find(base)
    edit(base / "config.json", model_type="phi3")
    with pytest.raises(
        ModelError, match=r"is a 'phi3' model: .* q, k and v in one matrix, .* a copy in Llama's layout"
    ):
        find(base)


def test_config_that_is_no_object_is_refused_with_a_message(base):
    (base / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"is a None model: FinLoRA runs model_type llama, mistral"):
        find(base)
    (base / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json is not valid JSON .*copy the model again"):
        find(base)


def test_quantised_weights_are_refused_with_a_message(base):
    edit(base / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    with pytest.raises(ModelError, match=r"already quantised: give the 16-bit model"):
        find(base)


def test_pickled_weights_are_refused_with_a_message(base):
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model.bin\), which can run code when read"):
        find(base)


def test_missing_weights_are_refused_with_a_message(base):
    (base / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"holds no weights: FinLoRA reads model.safetensors or its shards"):
        find(base)


@pytest.mark.parametrize("kept_share", [0.9, 0.0001, 0.0])
def test_truncated_weights_are_refused_with_a_message(base, kept_share):
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept_share)])
    words = "it is truncated, copy it again" if kept_share == 0.9 else "unreadable header.: copy it again"
    with pytest.raises(ModelError, match=words):
        find(base)


def test_truncated_shard_is_refused_with_a_message(sharded):
    path = sharded / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"00002-of-00002.safetensors has \d+ bytes, its header says \d+"):
        find(sharded)


def test_header_with_other_contents_is_refused_with_a_message(base):
    for contents in ({"model.norm.weight": {"dtype": "BF16"}}, {}, {"__metadata__": {"format": "pt"}}, []):
        header = json.dumps(contents).encode()
        (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(ModelError, match=r"is not a safetensors file"):
            find(base)


def test_missing_shard_is_refused_with_a_message(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"lacks 1 shards named by its index \(model-00002-of-00002.safetensors, ...\)"
    ):
        find(sharded)


def test_shard_of_another_model_is_refused_with_a_message(sharded):
    shutil.copy(sharded / "model-00001-of-00002.safetensors", sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(ModelError, match=r"00002-of-00002.safetensors lacks \d+ tensors that the index puts there"):
        find(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"model.norm.weight": 5}}'])
def test_broken_index_is_refused_with_a_message(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ModelError, match=r"index.json is not a safetensors index"):
        find(sharded)


def test_index_cannot_point_outside_its_folder(sharded, tmp_path):
    outside = tmp_path / "secret.safetensors"
    shutil.copy(sharded / "model-00001-of-00002.safetensors", outside)
    index = sharded / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    edit(index, weight_map=dict.fromkeys(names, "../secret.safetensors"))
    with pytest.raises(ModelError, match=r"lacks 1 shards named by its index \(secret.safetensors"):
        find(sharded)
    edit(index, weight_map=dict.fromkeys(names, str(outside)))
    with pytest.raises(ModelError, match=r"lacks 1 shards named by its index \(secret.safetensors"):
        find(sharded)


def test_missing_config_is_refused_with_a_message(base):
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json: expected a Hugging Face model folder"):
        find(base)


def test_missing_folder_is_refused_with_a_message(tmp_path):
    with pytest.raises(ModelError, match=r"absent is neither a folder here nor a hub id \(owner/name\)"):
        find(tmp_path / "absent")


def test_hub_model_that_is_not_here_says_what_to_do_offline():
    with pytest.raises(ModelError, match=r"nobody/nothing is not in the local hub cache.*set model.base to its folder"):
        find("nobody/nothing")


def test_fingerprint_is_stable_and_changes_with_any_tensor(base, tiny_base):
    before = fingerprint_weights(find(tiny_base))
    assert fingerprint_weights(find(base)) == before
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_weights(find(base)) != before


def test_absent_gpu_is_refused_with_a_message_and_never_replaced(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ResourceError, match=r"asks for a GPU .*train.device=cpu eval.device=cpu"):
        check_device(torch.device("cuda"))
    check_device(torch.device("cpu"))
