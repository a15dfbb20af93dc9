"""How the rows of a micro-batch attend to the KV cache of a layer.

Shapes: T rows of a micro-batch, R rows of the cache, h heads, g key-value heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby

import torch
from torch import Tensor

from finlora.data.packing import Segments
from finlora.engine.microbatch import MicroBatch, Segment
from finlora.model.attention import LONG, attend, attend_alone, attend_cache

_MOST_CACHED = 0.25
"""Cached rows, as a share of a segment's own, up to which it goes to cuDNN: that computes them again, in half the time."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query (T, h, d), all cached keys of a layer (R, g, d), all values (R, g, d)) -> output (T, h, d)."""


def make_attention(segments: Sequence[Segment], device: torch.device, *, goes_alone: bool = False) -> Attend:
    """Return attention of segments, whose keys are gathered only where some segment's lie in several places.

    Args:
        goes_alone: a long segment that sees few keys but its own goes to cuDNN by itself (`can_attend_alone`).
    """
    if not segments:
        return lambda query, _keys, _values: query
    if any(len(segment.keys) != 1 for segment in segments):
        return _gather(segments, device)
    parts: list[tuple[int, Attend]] = []
    for is_alone, group in groupby(segments, key=lambda segment: goes_alone and _is_alone(segment)):
        run = list(group)
        if is_alone:
            parts += [(segment.num_rows, _attend_alone(segment)) for segment in run]
        else:
            parts.append((sum(segment.num_rows for segment in run), _attend_in_place(run, device)))
    if len(parts) == 1:
        return parts[0][1]

    def attend_in_runs(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        pieces = query.split([num_rows for num_rows, _ in parts])
        return torch.cat([run(piece, keys, values) for piece, (_, run) in zip(pieces, parts, strict=True)])

    return attend_in_runs


def narrow(batch: MicroBatch, rows: Sequence[int]) -> tuple[list[Segment], list[tuple[str | None, int]]]:
    """Return the segments, and the adapters, of a micro-batch's wanted rows alone, each row a segment of its own.

    Args:
        rows: in ascending order.
    """
    segments, adapters, wanted = [], [], list(rows)
    start = 0
    for segment in batch.segments:
        start += segment.num_rows
        while wanted and wanted[0] < start:
            num_unseen = start - 1 - wanted.pop(0)
            segments.append(Segment(1, _first_keys(segment.keys, num_unseen)))
    end = 0
    for name, num_rows in batch.adapters:
        end += num_rows
        adapters.append((name, sum(end - num_rows <= row < end for row in rows)))
    return segments, adapters


def _first_keys(keys: Sequence[tuple[int, int]], num_unseen: int) -> tuple[tuple[int, int], ...]:
    """Return a segment's keys without the last ones."""
    left = sum(count for _, count in keys) - num_unseen
    seen = []
    for start, count in keys:
        if left > 0:
            seen.append((start, min(count, left)))
            left -= count
    return tuple(seen)


def _is_alone(segment: Segment) -> bool:
    num_cached = segment.keys[0][1] - segment.num_rows
    return segment.num_rows >= LONG and num_cached <= _MOST_CACHED * segment.num_rows


def _attend_alone(segment: Segment) -> Attend:
    start, num_keys = segment.keys[0]
    own, num_cached = slice(start, start + num_keys), num_keys - segment.num_rows

    def attend_keys(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        # Rows that stand for those of the cached beginning: cuDNN's causal mask begins at the first key.
        square = torch.nn.functional.pad(query, (0, 0, 0, 0, num_cached, 0))
        return attend_alone(square, keys[own], values[own])[num_cached:]

    return attend_keys


def _attend_in_place(segments: Sequence[Segment], device: torch.device) -> Attend:
    queries = [segment.num_rows for segment in segments]
    cumulative_queries = _to_int32([0, *accumulate(queries)], device)
    starts = _to_int32([*(segment.keys[0][0] for segment in segments), 0], device)
    lengths = _to_int32([segment.keys[0][1] for segment in segments], device)
    longest = max(queries)
    return lambda query, keys, values: attend_cache(query, keys, values, cumulative_queries, starts, lengths, longest)


def _gather(segments: Sequence[Segment], device: torch.device) -> Attend:
    queries = [segment.num_rows for segment in segments]
    counts = [sum(count for _, count in segment.keys) for segment in segments]
    places = [torch.arange(start, start + count) for segment in segments for start, count in segment.keys]
    key_rows = torch.cat(places).to(device)
    described = Segments(
        query_lengths=tuple(queries),
        key_lengths=tuple(counts),
        max_queries=max(queries),
        max_keys=max(counts),
        cumulative_queries=_to_int32([0, *accumulate(queries)], device),
        cumulative_keys=_to_int32([0, *accumulate(counts)], device),
        key_rows=key_rows,
        prefix_slots=None,
        own_slots=None,
    )
    return lambda query, keys, values: attend(query, keys[key_rows], values[key_rows], described)[0]


def _to_int32(numbers: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32).to(device)
