"""Log-probabilities of an answer's tokens in OpenAI's two forms. They are those before temperature and top_p."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from finlora.engine.request import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def chat_logprobs(answer: Answer, text: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return `choices[].logprobs` of chat completions."""
    content = [
        {"token": piece, "logprob": log_prob, "bytes": _bytes_of(piece), "top_logprobs": []}
        for piece, log_prob, _ in _list_tokens(answer, text, tokenizer)
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(answer: Answer, text: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return `choices[].logprobs` of completions."""
    rows = _list_tokens(answer, text, tokenizer)
    return {
        "tokens": [piece for piece, _, _ in rows],
        "token_logprobs": [log_prob for _, log_prob, _ in rows],
        "top_logprobs": None,
        "text_offset": [place for _, _, place in rows],
    }


def _list_tokens(answer: Answer, text: str, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, float, int]]:
    """Return (text, log-probability, place) of each token; those that only spell a stop string are left out."""
    rows, place = [], 0
    for token in answer.tokens:
        if answer.finish == "stop" and place >= len(text):
            break
        piece = str(tokenizer.decode([token.id]))
        rows.append((piece, token.log_prob, place))
        place += len(piece)
    return rows


def _bytes_of(piece: str) -> list[int] | None:
    """Return a token's bytes; None where it holds only a part of a character."""
    return None if "\ufffd" in piece else list(piece.encode())
