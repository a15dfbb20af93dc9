"""What the engine is asked and what it answers. No torch.

A request either generates text or chooses among answers; both begin with a prompt of token ids and may name an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from finlora.errors import ConfigError, ModelError

ADAPTER = "adapter"
"""Name of the adapter where an engine has one at most."""

Finish = Literal["end", "stop", "length", "choice", "cancelled", "deadline"]
"""Why an answer ended: the end token, a stop string, max_tokens, a choice was made, or somebody gave up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = 48
    """Most new tokens."""
    temperature: float = 0.0
    """0: greedy. Else logits are divided by it."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities sum up to it can be drawn (nucleus sampling, arXiv:1904.09751)."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; they are left out of it."""
    seed: int | None = None
    """Equal seeds draw equal tokens for equal logits, whatever else is in the batch. None: drawn anew."""

    def __post_init__(self) -> None:
        checks = [
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens}: expected at least 1"),
            (self.temperature >= 0, f"temperature={self.temperature}: expected at least 0"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: expected 0 < top_p <= 1"),
            (all(self.stop), "stop holds an empty text: expected texts of at least one character"),
        ]
        if faults := [message for is_good, message in checks if not is_good]:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One question to the engine."""

    id: str
    """Unique among the requests that the engine holds."""
    prompt_ids: tuple[int, ...]
    """At least one token, BOS included."""
    adapter: str | None = None
    """Name under which an adapter was loaded; None: the base alone."""
    sampling: Sampling = field(default_factory=Sampling)
    """Not looked at where there are choices."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Allowed answers as token ids, end token included; empty: text is generated."""
    client: str = ""
    """Whose request it is: clients take turns."""
    deadline: float | None = None
    """time.monotonic() after which nobody waits for the answer any more."""

    @property
    def num_tokens(self) -> int:
        """Cache rows that the request can need at most."""
        if self.choices:
            return len(self.prompt_ids) + sum(len(choice) for choice in self.choices)
        return len(self.prompt_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token."""

    id: int
    log_prob: float
    """Natural logarithm of its probability before temperature and top_p."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What a generated answer has gained."""

    text: str
    """Text that is certain now; all pieces joined are the answer's."""
    tokens: Sequence[Token]
    """Those that came since the piece before; the text of the last ones may still be held back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of a request."""

    request_id: str
    finish: Finish
    tokens: Sequence[Token] = ()
    """Generated tokens, the end token left out."""
    log_probs: Sequence[float] = ()
    """Of each choice, the sum over its tokens."""
    num_cached: int = 0
    """Prompt tokens that were found in the prefix cache."""

    def require_numbers(self) -> None:
        """Refuse an answer that rests on NaN, of which the likeliest token is always the first: it would look like any other.

        Raises:
            ModelError: base and adapter together gave what is no number.
        """
        if any(math.isnan(value) for value in (*self.log_probs, *(token.log_prob for token in self.tokens))):
            raise ModelError(
                f"the model computed NaN for request {self.request_id}: the adapter's numbers are too large for this base, or "
                "its weights are damaged. Ask the base alone, or train the adapter again."
            )


def normalise_choices(log_probs: Sequence[float]) -> list[float]:
    """Return the probability of each choice, given that it is one of them."""
    highest = max(log_probs)
    weights = [math.exp(value - highest) for value in log_probs]
    return [weight / sum(weights) for weight in weights]
