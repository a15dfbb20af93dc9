"""Log-probabilities of streamed tokens: each piece's tokens, with split characters and stop strings."""

from __future__ import annotations

from itertools import chain

import pytest

from finlora.engine.detokenise import Detokeniser
from finlora.engine.request import Answer, Piece, Token
from finlora.model.tokenizer import load_tokenizer
from finlora.serve.http.logprobs import TokenRows, list_rows

TEXT = "Umsatz: 5 € \U0001f600 mehr, dann nichts"


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    return load_tokenizer(tiny_base)


def stream(tokenizer, text, stop):
    """Return an engine's pieces of an answer, and the answer."""
    detokeniser, pieces, unsent, tokens = Detokeniser(tokenizer, stop), [], [], []
    for number, token_id in enumerate(tokenizer.encode(text, add_special_tokens=False)):
        tokens.append(Token(token_id, -float(number)))
        unsent.append(tokens[-1])
        if piece := detokeniser.push(token_id):
            pieces.append(Piece(piece, unsent))
            unsent = []
        if detokeniser.is_stopped:
            break
    if rest := detokeniser.finish():
        pieces.append(Piece(rest, unsent))
    return pieces, Answer(request_id="r", finish="stop" if detokeniser.is_stopped else "length", tokens=tokens)


@pytest.mark.parametrize("stop", [(), ("dann",), ("\U0001f600",), ("mehr, dann", "nie")])
def test_tokens_of_all_pieces_equal_those_of_the_whole_answer(tokenizer, stop):
    pieces, answer = stream(tokenizer, TEXT, stop)
    text = "".join(piece.text for piece in pieces)
    rows = TokenRows(tokenizer)
    taken = [rows.take(piece) for piece in pieces]
    assert [*chain(*taken), *rows.finish(answer)] == list_rows(answer, text, tokenizer)
    assert len([part for part in taken if part]) > 3


@pytest.mark.parametrize("stop", [(), ("nichts",)])
def test_tokens_of_a_split_character_share_its_offset_and_none_is_missing(tokenizer, stop):
    pieces, answer = stream(tokenizer, TEXT, stop)
    text = "".join(piece.text for piece in pieces)
    rows = list_rows(answer, text, tokenizer)
    kept = [token for token, row in zip(answer.tokens, rows, strict=False)]
    full = tokenizer.decode([token.id for token in answer.tokens])
    assert tokenizer.decode([token.id for token in kept]).startswith(text)
    assert all(row.offset < len(text) for row in rows)
    assert [row.log_prob for row in rows] == [token.log_prob for token in kept]
    broken = [row for row in rows if "\ufffd" in row.text]
    assert {text[row.offset] for row in broken} == {"€", "\U0001f600"}
    assert all(full[row.offset :].startswith(row.text) for row in rows if row not in broken)
