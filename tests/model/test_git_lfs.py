"""git-lfs pointers and llama.cpp models are refused by name."""

from __future__ import annotations

import dataclasses
import shutil

import pytest

from finlora.config import ModelConfig
from finlora.errors import ModelError
from finlora.model.base_files import read_base_files

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 134515008\n"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointer_instead_of_a_file_is_reported(tiny_base, tmp_path, name):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / name).write_text(POINTER)
    with pytest.raises(
        ModelError, match=rf"base/{name} is a git-lfs pointer, not the file itself: run `git lfs pull` in /"
    ):
        read_base_files(ModelConfig(base=str(base)))


def test_models_of_llama_cpp_are_reported(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "model.safetensors").rename(base / "model-q4.gguf")
    config = ModelConfig(base=str(base))
    with pytest.raises(ModelError, match=r"holds weights of llama.cpp \(model-q4.gguf\), which are quantised already"):
        read_base_files(config)
    with pytest.raises(ModelError, match=r"gguf is a file: give the folder of a Hugging Face model"):
        read_base_files(dataclasses.replace(config, base=str(base / "model-q4.gguf")))
