"""How much the engine takes on at once."""

from __future__ import annotations

from dataclasses import dataclass

from finlora.errors import ConfigError


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
