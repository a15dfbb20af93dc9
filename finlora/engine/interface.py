"""Protocol of an inference engine as evaluation uses it, in one process or in stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Engine(Protocol):
    """Answers token-id prompts with one model (and at most one adapter).

    `on_done` is called with the number of prompts answered so far.
    """

    def score_choices(
        self,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[Sequence[int]]],
        on_done: Callable[[int], None],
    ) -> list[list[float]]:
        """Return, for each prompt, the probability of each of its choices, normalised over them.

        Args:
            prompts: B prompts as token ids, BOS included.
            choices: for each prompt its allowed answers as token ids, end token included.
        """
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, on_done: Callable[[int], None]
    ) -> list[str]:
        """Return the greedy continuation of each prompt as text, without its end token."""
        ...
