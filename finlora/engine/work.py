"""A request that the scheduler has admitted, how far it has come, and its rows in a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from finlora.engine.extents import Extent
from finlora.engine.microbatch import Draw, MicroBatch, Score
from finlora.engine.request import Request, Token


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
    """Micro-batches under way that compute a part of it: one, several chunks of its prompt, or a token and the next one."""

    @property
    def is_prefilled(self) -> bool:
        return self.num_computed >= len(self.request.prompt_ids)


class Part(NamedTuple):
    """What a micro-batch under way computes of a request."""

    work: Work
    is_complete: bool
    """It brings what the request waits for."""
    draw: int | None
    """Place of its token among the micro-batch's; None where it brings none."""


def add_rows(batch: MicroBatch, work: Work, count: int, draw: int | None = None) -> Part:
    """Add the next rows of a request to a micro-batch, and what is wanted of them.

    Args:
        count: prompt tokens; 0: its last generated token.
        draw: where that token is not known yet, its place among those of the micro-batch that this one follows.
    """
    request, start = work.request, work.extent.start
    size, num_draws = len(request.prompt_ids), len(batch.draws)
    if count == 0:
        place = size + len(work.tokens) - (draw is None)
        last_id = work.tokens[-1].id if draw is None else -1 - draw
        row = batch.add([last_id], place, [start + place], [(start, place + 1)])
        _draw(batch, work, row, len(work.tokens) + (draw is not None))
        return Part(work, True, num_draws)
    done, end = work.num_computed, work.num_computed + count
    first = batch.add(request.prompt_ids[done:end], done, range(start + done, start + end), [(start, end)])
    work.num_computed = work.extent.num_ready = end
    if end < size:
        return Part(work, False, None)
    last = first + count - 1
    if not request.choices:
        _draw(batch, work, last, 0)
        return Part(work, True, num_draws)
    place = start + size
    for choice in request.choices:
        own = choice[:-1]
        row = last
        batch.scores.append(Score(last, choice[0]))
        if own:
            # The first choice's lie behind the prompt's.
            keys = [(start, size), (place, len(own))] if place > start + size else [(start, size + len(own))]
            row = batch.add(own, size, range(place, place + len(own)), keys)
            batch.scores += [Score(row + index, token) for index, token in enumerate(choice[1:])]
        place += len(own)
    return Part(work, True, None)


def _draw(batch: MicroBatch, work: Work, row: int, position: int) -> None:
    sampling = work.request.sampling
    batch.draws.append(Draw(row, sampling.temperature, sampling.top_p, work.seed, position))
