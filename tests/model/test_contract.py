"""finlora.yaml: an adapter goes on nothing but the base, tokenizer and template it was trained with."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml

from finlora.config import LoraConfig, ModelConfig
from finlora.errors import AdapterError
from finlora.model.base import load_base
from finlora.model.contract import CONTRACT_FILE, make_contract, read_contract, write_contract


@pytest.fixture(scope="module")
def base(tiny_base):
    return load_base(ModelConfig(base=str(tiny_base)), 4, torch.device("cpu"), 0)


@pytest.fixture
def contract(base):
    return make_contract(base, "owner/llama", LoraConfig(), "raw", {"fpb": "ab12"}, 3634, 4.51234, {"loss_last": 0.25})


def test_contract_reads_back_as_written(contract, tmp_path):
    write_contract(tmp_path, contract)
    assert read_contract(tmp_path) == contract
    assert [path.name for path in tmp_path.iterdir()] == [CONTRACT_FILE]
    assert (contract.variant, contract.quantisation, contract.adapter_mib) == (
        "4bit-r4",
        "NF4, double quantisation",
        4.512,
    )
    assert contract.target_modules == ["q_proj", "k_proj", "v_proj"]


def test_own_base_is_accepted_at_any_bits_unless_bits_are_asked_for(contract, base, tmp_path):
    contract.check(tmp_path, dataclasses.replace(base, bits=8), "raw")
    contract.check(tmp_path, base, "raw", bits=4)
    with pytest.raises(AdapterError, match=r"does not fit here: bits is 8, trained with 4"):
        contract.check(tmp_path, base, "raw", bits=8)


@pytest.mark.parametrize(
    ("changes", "template", "words"),
    [
        (
            {"weights_hash": "feed"},
            "raw",
            "does not fit here: weights hash is feed, trained with {weights_hash}[.] Load",
        ),
        (
            {"tokenizer_hash": "beef"},
            "raw",
            "does not fit here: tokenizer hash is beef, trained with {tokenizer_hash}[.] Load",
        ),
        ({}, "chat", "does not fit here: template is chat, trained with raw[.] Load"),
        ({"weights_hash": "feed"}, "chat", "weights hash is feed, .*; template is chat, trained with raw[.] Load"),
    ],
)
def test_other_base_tokenizer_or_template_is_refused_by_what_differs(
    contract, base, tmp_path, changes, template, words
):
    expected = words.format(weights_hash=base.weights_hash, tokenizer_hash=base.tokenizer_hash)
    with pytest.raises(AdapterError, match=f"was trained on owner/llama and {expected}" if changes == {} else expected):
        contract.check(tmp_path, dataclasses.replace(base, **changes), template)


def test_unfinished_and_missing_folders_are_told_apart(tmp_path):
    with pytest.raises(
        AdapterError, match=r"has no finlora.yaml, so its training did not finish: run `finlora train` to"
    ):
        read_contract(tmp_path)
    with pytest.raises(AdapterError, match=r"absent does not exist: run `finlora train` to its end"):
        read_contract(tmp_path / "absent")


@pytest.mark.parametrize("content", [b"base: x", b"[1]", b"a: b: c", b"\xff\xfe", b"", b"null"])
def test_broken_contract_is_refused_by_words(tmp_path, content):
    (tmp_path / CONTRACT_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=r"is not an adapter contract (?s:.)*: train again or restore the file"):
        read_contract(tmp_path)


def test_newer_format_is_refused_by_words(contract, tmp_path):
    (tmp_path / CONTRACT_FILE).write_text(yaml.safe_dump(dataclasses.asdict(contract) | {"finlora": 2}))
    with pytest.raises(AdapterError, match=r"has format 2, this FinLoRA reads 1: update FinLoRA"):
        read_contract(tmp_path)
