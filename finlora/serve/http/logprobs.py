"""Log-probabilities of an answer's tokens in OpenAI's two forms. They are those before temperature and top_p."""

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
    """One token of an answer."""

    text: str
    """Of the token alone; a part of a character is U+FFFD."""
    log_prob: float
    place: int
    """Character of the answer's text at which it begins."""


class TokenRows:
    """Tells which tokens go with the text that is out, piece by piece; over a whole answer the same as in one go."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer, self._text = tokenizer, Detokeniser(tokenizer)
        self._num_taken = self._place = self._num_out = 0
        self._waiting: list[TokenRow] = []

    def take(self, piece: Piece) -> list[TokenRow]:
        """Return the tokens whose text begins within what is out with this piece."""
        self._add(piece.tokens)
        self._num_out += len(piece.text)
        rows = [row for row in self._waiting if row.place < self._num_out]
        self._waiting = self._waiting[len(rows) :]
        return rows

    def finish(self, answer: Answer) -> list[TokenRow]:
        """Return the rest; behind a stop string nothing, since those tokens only spell it."""
        self._add(answer.tokens[self._num_taken :])
        return [] if answer.finish == "stop" else self._waiting

    def _add(self, tokens: Sequence[Token]) -> None:
        for token in tokens:
            self._waiting.append(TokenRow(str(self._tokenizer.decode([token.id])), token.log_prob, self._place))
            self._place += len(self._text.push(token.id))
        self._num_taken += len(tokens)


def list_rows(answer: Answer, text: str, tokenizer: PreTrainedTokenizerFast) -> list[TokenRow]:
    """Return the tokens of a whole answer."""
    rows = TokenRows(tokenizer)
    return rows.take(Piece(text, answer.tokens)) + rows.finish(answer)


def chat_logprobs(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Return `choices[].logprobs` of chat completions."""
    content = [
        {"token": row.text, "logprob": row.log_prob, "bytes": _bytes_of(row.text), "top_logprobs": []} for row in rows
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(rows: Sequence[TokenRow]) -> dict[str, Any]:
    """Return `choices[].logprobs` of completions."""
    return {
        "tokens": [row.text for row in rows],
        "token_logprobs": [row.log_prob for row in rows],
        "top_logprobs": None,
        "text_offset": [row.place for row in rows],
    }


def _bytes_of(piece: str) -> list[int] | None:
    """Return a token's bytes; None where it holds only a part of a character."""
    return None if "\ufffd" in piece else list(piece.encode())
