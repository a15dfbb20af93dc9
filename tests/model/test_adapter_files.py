"""An attacker's adapter folder is refused wherever it is loaded."""

from __future__ import annotations

import json
import os
import sys

import pytest
import torch
from safetensors.torch import save_file

from finlora.errors import AdapterError
from finlora.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter
from finlora.model.contract import CONTRACT_FILE, read_contract

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
SETTINGS = {"r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"], "peft_type": "LORA", "bias": "none"}
SETTINGS |= {"task_type": "CAUSAL_LM", "init_lora_weights": True, "megatron_core": "megatron.core", "rank_pattern": {}}


@pytest.fixture
def folder(tmp_path):
    """A good adapter."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(
        {f"{PREFIX}.lora_A.weight": torch.ones(2, 16), f"{PREFIX}.lora_B.weight": torch.ones(16, 2)},
        folder / ADAPTER_WEIGHTS,
    )
    (folder / ADAPTER_CONFIG).write_text(json.dumps(SETTINGS))
    assert check_adapter(folder).scale_of("q_proj") == 2.0
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config="),  # PEFT would import it
        ({"auto_mapping": {"parent_library": "antigravity"}}, "auto_mapping="),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights='pissa'.* Its base lacks a part of the weights: have PEFT convert",
        ),
        ({"init_lora_weights": "eva"}, r"init_lora_weights='eva'\): .* and DoRA\. Train the adapter"),
        ({"target_modules": "(a+)+$"}, "target_modules='"),  # a pattern that never ends
        ({"rank_pattern": {"(a+)+$": 2}}, "rank_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* A trained embedding or head would be every request's"),
        (
            {"bias": "all", "lora_bias": True},
            "bias='all'.* Trained biases would be every .*; an update with a bias is not",
        ),
        ({"a setting of tomorrow": 1}, "a setting of tomorrow=1"),
        ({"target_modules": ["../x"]}, "expected a rank of 1 to"),
        ({"r": 10**9}, "expected a rank of 1 to"),
        ({"r": 0}, "expected a rank of 1 to"),
        ({"r": True}, "expected a rank of 1 to"),
        ({"r": 4}, r"expected lora_A \(4, in\)"),
        ({"lora_alpha": float("nan")}, "a positive number"),
        ({"lora_alpha": float("inf")}, "a positive number"),
        ({"lora_alpha": "4"}, "a positive number"),
        ({"task_type": "SEQ_CLS"}, "task_type="),
    ],
)
def test_settings_that_are_not_plain_lora_are_refused(folder, changes, words):
    (folder / ADAPTER_CONFIG).write_text(json.dumps(SETTINGS | changes))
    with pytest.raises(AdapterError, match=words):
        check_adapter(folder)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"5", b"\xff", b"[" * 100_000, b"{" + b" " * 2**19, b'{"r": ' + b"9" * 9000 + b"}"]
)
def test_damaged_settings_are_refused(folder, content):
    (folder / ADAPTER_CONFIG).write_bytes(content)
    with pytest.raises(AdapterError, match=r"adapter_config\.json (is|holds|has)"):
        check_adapter(folder)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{PREFIX}.lora_A.weight": torch.ones(3, 16)}, r"as F32 \[3, 16\]"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(2)}, r"as F32 \[2\]"),
        ({f"{PREFIX}.lora_A.weight": torch.ones(2, 16, dtype=torch.int64)}, r"as I64"),
        ({"weight": torch.ones(2, 16)}, "holds weight as"),
        ({f"{PREFIX}.lora_A.weight": torch.full((2, 16), float("nan"))}, "infinite numbers or NaN"),
        ({f"{PREFIX}.lora_B.weight": torch.full((16, 2), float("inf"))}, "infinite numbers or NaN"),
    ],
)
def test_tensors_that_do_not_fit_the_settings_are_refused(folder, tensors, words):
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    with pytest.raises(AdapterError, match=words):
        check_adapter(folder)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        (2**62).to_bytes(8, "little") + b"{}",  # a header of 4 EiB
        (100 * 2**20).to_bytes(8, "little") + b"{}",
        b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 9,  # a pickle
        b"PK\x03\x04" + b"\0" * 64,  # a zip, as torch.save writes it
    ],
)
def test_what_is_no_safetensors_file_is_refused(folder, content):
    (folder / ADAPTER_WEIGHTS).write_bytes(content)
    with pytest.raises(AdapterError, match=r"is not a complete safetensors file"):
        check_adapter(folder)


@pytest.mark.parametrize("name", [ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONTRACT_FILE])
def test_links_pipes_and_folders_instead_of_files_are_refused(folder, tmp_path, name):
    def load():
        (read_contract if name == CONTRACT_FILE else check_adapter)(folder)

    secret = tmp_path / "secret.yaml"
    secret.write_text("password: [hunter2\n")
    path = folder / name
    for make, words in (
        (lambda: path.symlink_to(secret), "is a link to a file outside"),
        (lambda: path.symlink_to(path), r"has no|does not exist|cannot be read"),
        (lambda: os.mkfifo(path), "is not a regular file"),
        (lambda: path.mkdir(), "is not a regular file"),
    ):
        path.unlink(missing_ok=True)
        make()
        with pytest.raises(AdapterError, match=words) as refused:
            load()
        assert "hunter2" not in str(refused.value)
        if path.is_dir():
            path.rmdir()


def test_links_within_a_folder_and_to_a_folder_are_followed(folder, tmp_path):
    """As with files mounted by Kubernetes, and an operator's link to a run's adapter."""
    (folder / "data").mkdir()
    (folder / ADAPTER_CONFIG).rename(folder / "data" / "config")
    (folder / ADAPTER_CONFIG).symlink_to("data/config")
    (tmp_path / "link").symlink_to(folder)
    assert check_adapter(tmp_path / "link").rank == 2


@pytest.mark.parametrize(
    "text",
    [
        "base: &a [x]\nrevision: *a",
        "base: '\x1b[2J'",
        "base: !!python/object/apply:os.system ['true']",
        "bits: '4'",
        "data_hashes: [1]",
        "metrics: {a: b}",
        "base: " + "x" * 2_000,
        "unknown: 1",
    ],
)
def test_contract_of_other_kinds_is_refused_and_shows_no_control_character(folder, text):
    (folder / CONTRACT_FILE).write_text(text)
    with pytest.raises(AdapterError, match="is not an adapter contract") as refused:
        read_contract(folder)
    assert "\x1b" not in str(refused.value)
