"""A request that the scheduler has admitted, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from finlora.engine.extents import Extent
from finlora.engine.request import Finish, Request, Token


@dataclass(slots=True, eq=False)
class Work:
    """A request that was admitted."""

    request: Request
    extent: Extent
    seed: int
    num_cached: int
    num_computed: int
    """Prompt rows of micro-batches scheduled so far."""
    tokens: list[Token] = field(default_factory=list)
    in_flight: int = 0
    """Micro-batches under way that compute a part of it: one, or several chunks of its prompt."""
    ending: Finish | None = None
    """Somebody ended it while it was in flight."""

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= len(self.request.prompt_ids)
