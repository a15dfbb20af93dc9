"""Tokenizers: Llama 3's file gives Llama 3's ids, folders load, and anything else is refused by name."""

from __future__ import annotations

import base64
import json

import pytest

from finlora.errors import ModelError
from finlora.model.tokenizer import hash_tokenizer, load_tokenizer

# The pattern and special tokens of https://github.com/meta-llama/llama-models (commit a9c89c4), llama3/tokenizer.py.
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module")
def llama3_file(shared_data):
    path = shared_data / "llama3" / "tokenizer.model"
    if not path.is_file():
        pytest.skip("Llama 3's tokenizer file is not on this machine")
    return path


@pytest.fixture(scope="module")
def llama3(llama3_file):
    return load_tokenizer(llama3_file)


@pytest.mark.shared_data
def test_llama3_file_gives_its_tokens_and_special_ids(llama3):
    assert len(llama3) == 128_256
    expected = {
        "<|begin_of_text|>": 128_000,
        "<|end_of_text|>": 128_001,
        "<|reserved_special_token_0|>": 128_002,
        "<|finetune_right_pad_id|>": 128_004,
        "<|start_header_id|>": 128_006,
        "<|end_header_id|>": 128_007,
        "<|eom_id|>": 128_008,
        "<|eot_id|>": 128_009,
        "<|python_tag|>": 128_010,
    }
    assert {token: llama3.convert_tokens_to_ids(token) for token in expected} == expected
    assert (llama3.bos_token_id, llama3.eos_token_id, llama3.pad_token_id) == (128_000, 128_001, 128_004)


@pytest.mark.shared_data
def test_llama3_ids_equal_tiktoken_on_real_sentences(llama3, llama3_file, shared_data):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {}
    for line in llama3_file.read_bytes().splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    reference = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    file = shared_data / "fpb" / "Sentences_50Agree.txt"
    sentences = file.read_text(encoding="latin-1").splitlines()[:500]
    assert len(sentences) == 500
    for text in [*sentences, "Ünit\u2028 1234567 €\r\n\r\n  don't DON'T", "你好 🙂\t\t x", " ", "<|eot_id|> in a text"]:
        ids = llama3(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ids == reference.encode(text, disallowed_special=()), text


def test_cut_tiktoken_file_is_refused_instead_of_shifting_special_ids(tmp_path):
    path = tmp_path / "tokenizer.model"
    lines = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    path.write_text("\n".join(lines))
    with pytest.raises(ModelError, match=r"tokenizer.model holds 256 tokens, expected 128,000.*copy it again"):
        load_tokenizer(path)


@pytest.mark.parametrize("content", [b"\x00\xff\xfe no tokens", b"one_word_a_line\n", b"aGk= notanumber\n"])
def test_file_that_is_no_tiktoken_file_is_refused_with_a_message(tmp_path, content):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"is not a tiktoken file .*expected lines of a base64 token and its rank"):
        load_tokenizer(path)


def test_folder_without_tokenizer_is_refused_with_a_message(tmp_path):
    with pytest.raises(ModelError, match=r"holds no tokenizer: expected tokenizer.json or Llama 3's tokenizer.model"):
        load_tokenizer(tmp_path)


def test_tokenizer_without_eos_is_refused_with_a_message(tiny_base, tmp_path):
    tokenizer = load_tokenizer(tiny_base)
    tokenizer.save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"has no EOS token: expected one, which ends an answer"):
        load_tokenizer(tmp_path)


def test_missing_padding_token_is_taken_from_eos(tiny_base, tmp_path):
    load_tokenizer(tiny_base).save_pretrained(str(tmp_path))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("pad_token")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_hash_survives_saving_and_changes_with_template(tiny_base, tmp_path):
    tokenizer = load_tokenizer(tiny_base)
    before = hash_tokenizer(tokenizer)
    tokenizer(
        "some text", padding="max_length", max_length=50, truncation=True
    )  # the backend keeps the settings of this call
    tokenizer.save_pretrained(str(tmp_path))
    assert hash_tokenizer(load_tokenizer(tmp_path)) == before
    assert len(before) == 16
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert hash_tokenizer(tokenizer) != before
