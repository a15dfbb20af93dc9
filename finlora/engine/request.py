"""Requests to the engine and their answers. No torch.

A request has a prompt of token ids and may name an adapter; it either generates text or scores given choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from finlora.errors import ConfigError, ModelError

ADAPTER = "adapter"
"""Name of the adapter in an engine that has at most one."""

Finish = Literal["end", "stop", "length", "choice", "cancelled", "deadline", "grammar"]
"""Why an answer ended: the end token, a stop string, max_tokens, scored choices, cancelled by the caller, past its deadline, or a
grammar that became too large to follow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = 48
    """Most tokens to generate."""
    temperature: float = 0.0
    """0: greedy; otherwise logits are divided by it."""
    top_p: float = 1.0
    """Nucleus sampling: only the likeliest tokens whose probabilities sum up to it are sampled (arXiv:1904.09751)."""
    stop: tuple[str, ...] = ()
    """Stop strings: they end the answer and are left out of it."""
    seed: int | None = None
    """Equal seeds sample equal tokens from equal logits, whatever else is in the batch. None: a random seed."""
    top_k: int = 0
    """Only the likeliest top_k tokens are sampled; 0: all."""
    min_p: float = 0.0
    """Only tokens with at least this share of the likeliest one's probability are sampled (arXiv:2407.01082)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, number that is added to its logit)."""
    presence_penalty: float = 0.0
    """Taken from the logit of each token that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken from it once for each time that the answer holds the token."""
    min_tokens: int = 0
    """The end token is not sampled before so many tokens."""
    ignore_end: bool = False
    """The end token does not end the answer."""
    num_top: int = 0
    """Likeliest tokens that are returned with each token."""
    grammar: str = ""
    """Grammar of the generated text, made by finlora/grammar/compile.py; empty: any text."""

    def __post_init__(self) -> None:
        checks = [
            (self.max_tokens >= 1, f"max_tokens={self.max_tokens}: expected at least 1"),
            (self.temperature >= 0, f"temperature={self.temperature}: expected at least 0"),
            (0 < self.top_p <= 1, f"top_p={self.top_p}: expected 0 < top_p <= 1"),
            (self.top_k >= 0, f"top_k={self.top_k}: expected at least 1, or 0 for all tokens"),
            (0 <= self.min_p <= 1, f"min_p={self.min_p}: expected 0 to 1"),
            (
                0 <= self.min_tokens <= self.max_tokens,
                f"min_tokens={self.min_tokens}: expected 0 to max_tokens={self.max_tokens}",
            ),
            (
                not self.grammar or not (self.min_tokens or self.ignore_end),
                "min_tokens and ignore_end do not go with a grammar, which says where the answer ends: leave them out",
            ),
            (
                all(-2 <= value <= 2 for value in (self.presence_penalty, self.frequency_penalty)),
                f"presence_penalty={self.presence_penalty}, frequency_penalty={self.frequency_penalty}: expected -2 to 2",
            ),
            (all(self.stop), "stop holds an empty text: expected texts of at least one character"),
        ]
        if faults := [message for is_good, message in checks if not is_good]:
            raise ConfigError(faults)

    @property
    def has_penalty(self) -> bool:
        """Whether a logit depends on the tokens before."""
        return bool(self.presence_penalty or self.frequency_penalty)


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Prompt, and how to answer it."""

    id: str
    """Unique among waiting and active requests."""
    prompt_ids: tuple[int, ...]
    """At least one token, BOS included."""
    adapter: str | None = None
    """Name of a loaded adapter; None: the base model alone."""
    sampling: Sampling = field(default_factory=Sampling)
    """Ignored if there are choices."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Choices to score, as token ids, end token included; empty: text is generated."""
    client: str = ""
    """Who sent the request: the queue is fair among clients."""
    deadline: float | None = None
    """time.monotonic() at which the request is ended."""

    @property
    def num_tokens(self) -> int:
        """Most cache rows that the request can need."""
        if self.choices:
            return len(self.prompt_ids) + sum(len(choice) for choice in self.choices)
        return len(self.prompt_ids) + self.sampling.max_tokens


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token."""

    id: int
    log_prob: float
    """Natural logarithm of its probability before grammar, temperature and filters."""
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability) of the likeliest tokens there, likeliest first, as many as the request asks for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """New text of a generated answer."""

    text: str
    """Text that is final now; all pieces joined are the answer."""
    tokens: Sequence[Token]
    """Tokens since the last piece; the text of the newest may still be held back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Result of a request."""

    request_id: str
    finish: Finish
    tokens: Sequence[Token] = ()
    """Generated tokens, without the end token."""
    log_probs: Sequence[float] = ()
    """Log-probability of each choice, the sum over its tokens."""
    num_cached: int = 0
    """Prompt tokens taken from the prefix cache."""
    fault: str = ""
    """Why the grammar could not be followed, where finish is `grammar`."""

    def require_numbers(self) -> None:
        """Reject an answer computed from NaN, which would look like any other: argmax of NaN logits is token 0.

        Raises:
            ModelError: base model and adapter together computed NaN.
        """
        if any(math.isnan(value) for value in (*self.log_probs, *(token.log_prob for token in self.tokens))):
            raise ModelError(
                f"the model computed NaN for request {self.request_id}: the adapter's numbers are too large for this base, or "
                "its weights are damaged. Ask the base alone, or train the adapter again."
            )


def normalise_choices(log_probs: Sequence[float]) -> list[float]:
    """Return the probability of each choice, normalised over all choices."""
    highest = max(log_probs)
    weights = [math.exp(value - highest) for value in log_probs]
    return [weight / sum(weights) for weight in weights]
