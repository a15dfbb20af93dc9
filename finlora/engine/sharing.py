"""Which beginnings of prompts a micro-batch computes: a prompt that begins alike waits for the next one and copies them."""

from __future__ import annotations

from finlora.engine.request import Request


class Beginnings:
    """Beginnings of prompts, found by their length in a time that does not grow with their number."""

    def __init__(self) -> None:
        self._prompts: list[tuple[Request, int]] = []
        self._by_length: dict[int, set[tuple[str | None, tuple[int, ...]]]] = {}

    def add(self, request: Request, num_computed: int) -> None:
        """Count a prompt, of which so many first tokens will be computed."""
        self._prompts.append((request, num_computed))
        for length, found in self._by_length.items():
            if num_computed >= length:
                found.add((request.adapter, request.prompt_ids[:length]))

    def has(self, request: Request, length: int) -> bool:
        """Return whether so many first tokens of a prompt, and fewer than all, are among them for its adapter."""
        if length >= len(request.prompt_ids) or not self._prompts:
            return False
        if length not in self._by_length:
            longer = (other for other, num_computed in self._prompts if num_computed >= length)
            self._by_length[length] = {(other.adapter, other.prompt_ids[:length]) for other in longer}
        return (request.adapter, request.prompt_ids[:length]) in self._by_length[length]
