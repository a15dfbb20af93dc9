"""The small base of `finlora pretrain`: a complete Hugging Face folder."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer

from finlora.config import ModelConfig
from finlora.data.pretraining.generated_texts import pretraining_texts
from finlora.errors import DatasetError, ModelError
from finlora.model.base import load_base
from finlora.model.pretrain import PretrainConfig, pretrain_base, run_pretraining
from finlora.model.tokenizer import load_tokenizer


def test_base_folder_holds_llama_and_its_tokenizer(tiny_base):
    config = json.loads((tiny_base / "config.json").read_text())
    tokenizer = load_tokenizer(tiny_base)
    assert (config["model_type"], config["hidden_size"], config["num_hidden_layers"]) == ("llama", 64, 2)
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "bfloat16")
    assert config["vocab_size"] == len(tokenizer) == 512
    assert config["bos_token_id"] == tokenizer.bos_token_id != tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token_id not in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert [path.suffix for path in tiny_base.iterdir() if path.suffix in (".bin", ".pt", ".pickle")] == []
    assert [path.name for path in tiny_base.parent.iterdir() if path.name.startswith(".")] == []


def test_text_survives_encoding_and_decoding(tiny_base):
    tokenizer = load_tokenizer(tiny_base)
    text = "Profit of Ünit 3 rose 12.5 % to 1,234 million €.\n\n  Next: 你好"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_too_little_text_is_refused_with_a_message(tmp_path):
    with pytest.raises(DatasetError, match=r"1 texts give \d+ tokens: expected at least one block of 257"):
        pretrain_base(["few words"], PretrainConfig(), tmp_path / "x", torch.device("cpu"), lambda *_: None)
    assert not (tmp_path / "x").exists()


def test_pretraining_happens_once_and_other_settings_or_texts_are_refused(prepared_synthetic, tmp_path, monkeypatch):
    notes = []
    shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_layers": 1, "context_length": 32}
    settings = PretrainConfig(**shape, batch_size=2, num_steps=12)

    def pretrain(settings):
        return run_pretraining(
            settings,
            ["synthetic_sentiment"],
            prepared_synthetic,
            tmp_path / "base",
            "cpu",
            lambda *note: notes.append(note),
        )

    assert f"Base {tmp_path / 'base'}" in pretrain(settings)
    assert [note[:3] for note in notes] == [("pretraining", step, 12) for step in range(1, 13)]
    assert float(notes[-1][3].removeprefix("loss ")) < float(notes[0][3].removeprefix("loss "))
    before = (tmp_path / "base" / "model.safetensors").stat()
    assert before.st_mode == (tmp_path / "base" / "config.json").stat().st_mode
    assert "is complete already, kept" in pretrain(settings)
    assert (tmp_path / "base" / "model.safetensors").stat() == before
    with pytest.raises(
        ModelError, match=r"holds another model already, or one of other texts or settings: choose another --output"
    ):
        pretrain(PretrainConfig(**shape, batch_size=2, num_steps=13))
    monkeypatch.setattr("finlora.model.pretrain._texts_of", lambda *_: ["Profit rose."])
    with pytest.raises(ModelError, match=r"or one of other texts or settings"):
        pretrain(settings)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "granite"])
def test_base_of_another_family_is_its_own_class_and_keeps_its_tokenizer(tmp_path, family):
    """transformers would build a tokenizer of its own for model_type qwen2, which splits numbers otherwise."""
    settings = PretrainConfig(
        family=family,
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_layers=1,
        context_length=32,
        num_steps=1,
    )
    pretrain_base(pretraining_texts(1, 20), settings, tmp_path / "base", torch.device("cpu"), lambda _step, _loss: None)
    base = load_base(ModelConfig(base=str(tmp_path / "base")), 16, torch.device("cpu"), 0)
    assert base.model.config.model_type == family
    file = Tokenizer.from_file(str(tmp_path / "base" / "tokenizer.json"))
    text = "Profit rose 12345 % in 2026"
    assert base.tokenizer(text)["input_ids"] == file.encode(text).ids
    assert len(base.tokenizer) == base.model.config.vocab_size
