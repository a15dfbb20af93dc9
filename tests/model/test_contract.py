"""finlora.yaml: an adapter loads only on the base, tokenizer and template of its training."""

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
        ({}, "chat", "does not fit here: template is chat, trained with raw[.] Set model.template=raw[.] Load"),
        ({"weights_hash": "feed"}, "chat", "weights hash is feed, .*; template is chat, trained with raw[.] Load"),
    ],
)
def test_other_base_tokenizer_or_template_is_refused_by_what_differs(
    contract, base, tmp_path, changes, template, words
):
    expected = words.format(weights_hash=base.weights_hash, tokenizer_hash=base.tokenizer_hash)
    with pytest.raises(AdapterError, match=f"was trained on owner/llama and {expected}" if changes == {} else expected):
        contract.check(tmp_path, dataclasses.replace(base, **changes), template)


@pytest.mark.parametrize(
    ("files", "asked", "words"),
    [
        ((), "absent", r"absent does not exist: run `finlora train` to its end"),
        (
            ("config.yaml",),
            "adapter",
            r"has no finlora.yaml, so its training did not finish: run `finlora train` to its",
        ),
        (("config.yaml", "adapter/adapter_config.json"), "adapter", r"has no finlora.yaml, so its training did not"),
        (
            ("adapter/config.yaml", "adapter/adapter_config.json"),
            "adapter",
            r"has no finlora.yaml, so its training did",
        ),
        (("config.yaml", "adapter/finlora.yaml"), "", r"is the folder of a run: give .*/adapter\."),
        (
            ("adapter_config.json", "adapter_model.safetensors"),
            "",
            r"is a PEFT adapter that FinLoRA did not train: it has no finlora.yaml, which names .*finlora adopt FOLDER",
        ),
        (("config.json", "model.safetensors"), "", r"is a model, not an adapter: give it as model.base"),
        (("notes.txt",), "", r"holds no finlora.yaml and no adapter_config.json: give the `adapter` folder of a"),
    ],
)
def test_what_is_not_a_finished_adapter_is_reported_by_what_it_is(tmp_path, files, asked, words):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with pytest.raises(AdapterError, match=words):
        read_contract(tmp_path / asked)


@pytest.mark.parametrize("content", [b"base: x", b"[1]", b"a: b: c", b"\xff\xfe", b"", b"null"])
def test_broken_contract_is_refused_with_a_message(tmp_path, content):
    (tmp_path / CONTRACT_FILE).write_bytes(content)
    with pytest.raises(AdapterError, match=r"is not an adapter contract (?s:.)*: train again or restore the file"):
        read_contract(tmp_path)


def test_all_wrong_fields_are_named_together_with_what_was_expected(contract, tmp_path):
    wrong = {"rank": "four", "metrics": {"loss_last": "low"}, "data_hashes": ["x"], "target_module": ["q_proj"]}
    (tmp_path / CONTRACT_FILE).write_text(yaml.safe_dump(dataclasses.asdict(contract) | wrong))
    with pytest.raises(AdapterError, match=r"is not an adapter contract \(.*\): train again") as refused:
        read_contract(tmp_path)
    for words in (
        "rank='four': expected an integer",
        "metrics['loss_last']='low': expected a number",
        "data_hashes=['x']: expected keys with values",
        "target_module is not a setting: did you mean target_modules",
    ):
        assert words in str(refused.value)


def test_text_that_could_change_what_a_terminal_shows_is_refused(contract, tmp_path):
    (tmp_path / CONTRACT_FILE).write_text(yaml.safe_dump(dataclasses.asdict(contract) | {"base": "a\x1b[2J"}))
    with pytest.raises(AdapterError, match=r"\('base' is 'a\\x1b\[2J'\)"):
        read_contract(tmp_path)


def test_newer_format_is_refused_with_a_message(contract, tmp_path):
    (tmp_path / CONTRACT_FILE).write_text(yaml.safe_dump(dataclasses.asdict(contract) | {"finlora": 6}))
    with pytest.raises(AdapterError, match=r"has format 6, this FinLoRA reads 5: update FinLoRA"):
        read_contract(tmp_path)


@pytest.fixture
def folder(contract, tmp_path):
    """An adapter folder that is complete for its contract."""
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.yaml"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    write_contract(tmp_path, contract)
    return tmp_path


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "config.yaml"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_damaged_file_beside_it_is_refused_by_its_name(folder, base, name, damage):
    read_contract(folder).check(folder, base, "raw")
    content = bytearray((folder / name).read_bytes())
    content[17] ^= 4
    (folder / name).write_bytes(content if damage == "flipped" else content[:-1])
    if damage == "missing":
        (folder / name).unlink()
    said = "is missing" if damage == "missing" else "differs"
    with pytest.raises(AdapterError, match=rf"has changed since it was written: {name} {said}. Copy the adapter again"):
        read_contract(folder).check(folder, base, "raw")


def test_changed_contract_is_refused_unless_its_hash_is_taken_out_too(folder):
    path = folder / CONTRACT_FILE
    path.write_text(path.read_text().replace("loss_last: 0.25", "loss_last: 0.24"))
    with pytest.raises(AdapterError, match=r"it was changed after it was written.* remove its line `sha256`"):
        read_contract(folder)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("sha256: ")))
    assert read_contract(folder).metrics == {"loss_last": 0.24}


def test_cut_contract_is_refused_wherever_it_is_cut(folder):
    text = (folder / CONTRACT_FILE).read_text()
    last = text.index("finlora: 5") + len("finlora: 5")  # what follows is the hash alone
    for end in range(last):
        (folder / CONTRACT_FILE).write_text(text[:end])
        with pytest.raises(AdapterError):
            read_contract(folder)


def test_adapter_of_the_first_format_loads_and_says_that_it_cannot_be_checked(folder, base, caplog):
    values = yaml.safe_load((folder / CONTRACT_FILE).read_text())
    for key in ("files", "sha256"):
        del values[key]
    (folder / CONTRACT_FILE).write_text(yaml.safe_dump(values | {"finlora": 1}))
    read_contract(folder).check(folder, base, "raw")
    assert "has no hashes of its files" in caplog.text


def rewrite(folder, **changes):
    """Change a contract as its error message says."""
    values = yaml.safe_load((folder / CONTRACT_FILE).read_text()) | changes
    del values["sha256"]
    (folder / CONTRACT_FILE).write_text(yaml.safe_dump(values))
    return read_contract(folder)


def test_date_of_the_training_is_the_date_of_the_prompts(contract, tmp_path):
    write_contract(tmp_path, dataclasses.replace(contract, template_date="2025-03-01"))
    read = read_contract(tmp_path)
    assert read.choose_date(tmp_path, "2024-07-26") == "2025-03-01"
    assert read.choose_date(tmp_path, "2025-03-01", "2025-03-01") == "2025-03-01"
    with pytest.raises(
        AdapterError, match=r"was trained with the date 2025-03-01 in its prompts, and model.template_date=2026"
    ):
        read.choose_date(tmp_path, "2026-01-01", "2026-01-01")
    with pytest.raises(AdapterError, match=r"contract \(template_date='1 March': expected a date such as 2024-07-26\)"):
        rewrite(tmp_path, template_date="1 March")


def test_adapter_without_a_date_takes_none(contract, tmp_path, caplog):
    """It was trained with the template's own date, from which a set date would differ."""
    assert contract.choose_date(tmp_path, None) is None
    with pytest.raises(AdapterError, match=r"was trained with the date of the chat template itself in its prompts"):
        contract.choose_date(tmp_path, "2026-01-01", "2026-01-01")
    assert caplog.text == ""


def test_adapter_of_a_version_that_noted_no_date_loads_and_says_so(folder, caplog):
    old = rewrite(folder, finlora=2)
    assert old.choose_date(folder, None) is None
    assert caplog.text == ""
    assert old.choose_date(folder, "2024-07-26") == "2024-07-26"
    assert "does not record the date in its training prompts" in caplog.text
    assert old.choose_date(folder, "2025-03-01", "2025-03-01") == "2025-03-01"
