"""How much the engine takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from finlora.errors import ConfigError

MIN_PREFIX = 16
"""Tokens of common beginning from which a request waits one micro-batch for another that computes them."""
MIN_CHUNK = 512
"""Prompt tokens below which a micro-batch is not cut further to give every stage a part, nor started ahead."""
MIN_AHEAD_CHUNK = 4096
"""Prompt tokens below which a micro-batch is not cut to have one ready ahead: each part reads and unpacks all weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much the engine takes on."""

    cache_rows: int
    """Tokens that the KV cache holds."""
    max_batch_tokens: int = 2048
    """Most rows of a micro-batch."""
    max_waiting: int = 1024
    """Most requests in line."""
    max_in_flight: int = 1
    """Micro-batches under way at once: the number of stages; one more before the first follows them, or has prompts."""
    keeps_prefixes: bool = True
    follows: bool = False
    """Whether the stages can begin with tokens that a micro-batch under way draws (Executor.can_follow)."""

    def __post_init__(self) -> None:
        checks = {"cache_rows": 16, "max_batch_tokens": 1, "max_waiting": 1, "max_in_flight": 1}
        values = {key: getattr(self, key) for key in checks}
        if faults := [
            f"{key}={values[key]}: expected at least {least}" for key, least in checks.items() if values[key] < least
        ]:
            raise ConfigError(faults)
