"""Log-probabilities of an answer's tokens, before grammar, temperature and top_p, in OpenAI's two formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finlora.engine.detokenise import Detokeniser
from finlora.engine.request import Answer, Piece, Token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Token of an answer."""

    text: str
    """Text of the token alone; a part of a character is U+FFFD."""
    log_prob: float
    offset: int
    """Character of the answer's text at which the token begins."""
    top: tuple[tuple[str, float], ...] = ()
    """Texts and log-probabilities of the most probable tokens there."""


class TokenRows:
    """Assignment of tokens to the pieces of a streamed text. All pieces together hold the tokens of the whole answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self._text = tokenizer, Detokeniser(tokenizer)
        self._num_taken = self._offset = self._num_out = 0
        self._waiting: list[TokenRow] = []

    def take(self, piece: Piece) -> list[TokenRow]:
        """Return the tokens whose text begins in the text sent up to and with this piece."""
        self._add(piece.tokens)
        self._num_out += len(piece.text)
        rows = [row for row in self._waiting if row.offset < self._num_out]
        self._waiting = self._waiting[len(rows) :]
        return rows

    def finish(self, answer: Answer) -> list[TokenRow]:
        """Return the remaining tokens; none after a stop string, because those tokens only spell it."""
        self._add(answer.tokens[self._num_taken :])
        return [] if answer.finish == "stop" else self._waiting

    def _add(self, tokens: Sequence[Token]) -> None:
        for token in tokens:
            top = tuple((self._decode(other), log_prob) for other, log_prob in token.top)
            self._waiting.append(TokenRow(self._decode(token.id), token.log_prob, self._offset, top))
            self._offset += len(self._text.push(token.id))
        self._num_taken += len(tokens)

    def _decode(self, token_id: int) -> str:
        return str(self._tokenizer.decode([token_id]))


def list_rows(answer: Answer, text: str, tokenizer: PreTrainedTokenizerFast) -> list[TokenRow]:
    """Return the tokens of a whole answer."""
    rows = TokenRows(tokenizer)
    return rows.take(Piece(text, answer.tokens)) + rows.finish(answer)


def chat_logprobs(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Return `choices[].logprobs` of chat completions."""
    content = [
        _entry(row.text, row.log_prob) | {"top_logprobs": [_entry(text, log_prob) for text, log_prob in row.top]}
        for row in rows
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Return `choices[].logprobs` of completions."""
    return {
        "tokens": [row.text for row in rows],
        "token_logprobs": [row.log_prob for row in rows],
        # As OpenAI: the token of the answer is among them. Of two tokens with one text the more probable counts.
        "top_logprobs": [{row.text: row.log_prob} | dict(reversed(row.top)) for row in rows]
        if any(row.top for row in rows)
        else None,
        "text_offset": [row.offset for row in rows],
    }


def _entry(text: str, log_prob: float) -> dict[str, Any]:
    return {"token": text, "logprob": log_prob, "bytes": _bytes_of(text)}


def _bytes_of(piece: str) -> list[int] | None:
    """Return a token's bytes; None if it holds only a part of a character."""
    return None if "\ufffd" in piece else list(piece.encode())
