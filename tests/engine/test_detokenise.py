"""Streamed text equals the decoding of all tokens, cut at the first stop string."""

from __future__ import annotations

from pathlib import Path

import pytest

from finlora.engine.detokenise import Detokeniser
from finlora.model.tokenizer import load_tokenizer

TEXTS = [
    "Profit rose 3.2 % to EUR 1,234.5m .",
    "  two  spaces, a tab\tand\n\na blank line",
    "日本の売上高は増加した。",
    "up 📈📈 and 👩‍💻 ¥5",
    "naïve café — “quoted”",
    "",
]


@pytest.fixture(scope="module", params=["own", "llama3"])
def tokenizer(request, tiny_base):
    if request.param == "own":
        return load_tokenizer(tiny_base)
    return load_tokenizer(Path(request.getfixturevalue("shared_data")) / "llama3" / "tokenizer.model")


def stream(tokenizer, ids, stop=()):
    text = Detokeniser(tokenizer, stop)
    pieces = [text.push(token) for token in ids]
    return [*pieces, text.finish()], text.is_stopped


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_equal_the_whole(tokenizer, text):
    ids = ids_of(tokenizer, text)
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_is_streamed_while_tokens_come(tokenizer):
    pieces, _ = stream(tokenizer, ids_of(tokenizer, TEXTS[0]))
    assert sum(bool(piece) for piece in pieces[:-1]) > 5


def test_bytes_that_never_become_a_character_come_at_the_end(tokenizer):
    ids = ids_of(tokenizer, "ok 📈")[:-1]
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_special_tokens_are_no_text(tokenizer):
    ids = ids_of(tokenizer, "one")
    pieces, _ = stream(tokenizer, [*ids, tokenizer.eos_token_id, *ids])
    assert "".join(pieces) == "oneone"


@pytest.mark.parametrize("text", TEXTS[:5])
def test_every_stop_string_cuts_at_its_first_occurrence(tokenizer, text):
    """Stop strings of one to four characters from everywhere in the text, most of them across token borders."""
    ids = ids_of(tokenizer, text)
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for start in range(len(whole)):
        for length in (1, 4):
            stop = whole[start : start + length]
            pieces, is_stopped = stream(tokenizer, ids, ("never there", stop))
            assert is_stopped
            assert "".join(pieces) == whole[: whole.index(stop)]


def test_possible_start_of_a_stop_string_is_held_back_until_the_end(tokenizer):
    text = Detokeniser(tokenizer, ("rose to 9",))
    pieces = [text.push(token) for token in ids_of(tokenizer, "Profit rose to 4")]
    assert "".join(pieces) + text.finish() == "Profit rose to 4"
    assert not text.is_stopped
    held = Detokeniser(tokenizer, ("rose to 9",))
    assert "rose" not in "".join(held.push(token) for token in ids_of(tokenizer, "Profit rose to"))


def test_nothing_follows_a_stop_string(tokenizer):
    text = Detokeniser(tokenizer, ("b",))
    for token in ids_of(tokenizer, "a b c"):
        text.push(token)
    assert text.is_stopped
    assert (text.push(ids_of(tokenizer, "d")[0]), text.finish()) == ("", "")
