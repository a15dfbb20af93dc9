"""Vocabulary of a base in llguidance's form, built when the first grammar needs it, and matchers of grammars over it.

llguidance computes masks while it parses, so a grammar has no states to enumerate ahead. Its limits bound the memory and the time
of each step: a grammar that reaches one puts its own matcher into an error state.
"""

from __future__ import annotations

import copy
import threading
from typing import TYPE_CHECKING, Any

from finlora.errors import ModelError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from transformers import PreTrainedTokenizerFast

_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,  # 10 ms
    "step_lexer_fuel": 100_000,  # 7 ms
    "step_max_items": 50_000,  # 3 ms
    "max_lexer_states": 20_000,  # of up to 2 kB
    "max_grammar_size": 100_000,
}
"""Limits of a compiled grammar. Times are llguidance's own, on one core."""


class Vocabulary:
    """Bytes of each token, and the token that ends an answer. Special tokens spell no text, so no grammar allows them.

    Args:
        end_token_id: allowed where the grammar is complete, and nowhere else.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end_token_id: int) -> None:
        self.end_token_id, self._tokenizer = end_token_id, tokenizer
        self._opened: LLTokenizer | None = None
        self._lock = threading.Lock()

    def open(self) -> LLTokenizer:
        """Return the grammar engine's vocabulary. The first call takes about a second. Thread-safe.

        Raises:
            ModelError: llguidance does not know this kind of tokenizer.
        """
        with self._lock:
            if self._opened is None:
                from llguidance import LLTokenizer

                backend = copy.copy(self._tokenizer.backend_tokenizer)  # padding and truncation are this copy's alone
                backend.no_padding()
                backend.no_truncation()
                try:
                    self._opened = LLTokenizer(backend.to_str(), eos_token=self.end_token_id)
                except ValueError as error:
                    raise ModelError(
                        f"structured output is not possible with this base: llguidance cannot read its tokenizer ({error}). Ask "
                        "without a schema, pattern, choice or tools."
                    ) from error
            return self._opened

    def start(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar. One that cannot be compiled is in its error state."""
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(**_LIMITS, verbose_errors=False)
        return LLMatcher(self.open(), grammar, log_level=0, limits=limits)
