"""Streaming detokenisation: holds back half characters, and text that may be the start of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNFINISHED = "\ufffd"
"""What a tokenizer returns for bytes that are not a whole character yet."""


class Detokeniser:
    """Text of one answer in pieces; joined, they equal the tokenizer's decoding of all tokens, cut before the first stop string.

    Args:
        stop: texts that end the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Text of ids before `_read` was returned; decoding starts at `_start`, since a token's text depends on the one before.
        self._start = self._read = 0
        self._held = ""
        self.is_stopped = False

    def push(self, token_id: int) -> str:
        """Add a token and return the text that is final now."""
        if self.is_stopped:
            return ""
        self._ids.append(token_id)
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        if text.endswith(_UNFINISHED) or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(text[len(known) :])

    def finish(self) -> str:
        """Return the text that was held back; after a stop string, none."""
        if self.is_stopped:
            return ""
        known, text = self._decode(self._start, self._read), self._decode(self._start, len(self._ids))
        self._start = self._read = len(self._ids)
        piece = self._release(text[len(known) :])
        rest, self._held = self._held, ""
        return piece + rest

    def _decode(self, start: int, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True))

    def _release(self, text: str) -> str:
        """Add text to what is held back, and return the part that no stop string can include."""
        text = self._held + text
        ends = [index for stop in self._stop if (index := text.find(stop)) >= 0]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
