"""How the rows of a micro-batch attend to the KV cache of a layer.

Where FlashAttention is there, it finds keys that lie side by side; rows that see keys in two places, those of a question's
answers, see each place by itself (`attend_two_places`). Elsewhere the rows of a request are one product with a mask.

Shapes: T rows of a micro-batch, R rows of the cache, h heads, g key-value heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from finlora.engine.microbatch import MicroBatch, Segment
from finlora.model.attention import LONG, Places, attend_alone, attend_cache, join_places

_MOST_CACHED = 0.25
"""Cached rows, as a share of a segment's own, up to which it goes to cuDNN: that computes them again, in half the time."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query (T, h, d), all cached keys of a layer (R, g, d), all values (R, g, d)) -> output (T, h, d)."""
_AttendRun = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""The same for some segments that follow each other; with the log-sum-exp of the scores (h, rows)."""


class Tail(NamedTuple):
    """Rows of a segment with keys in two places: those in the second, which are the rows' own and lie behind the others."""

    row: int
    """The first."""
    num_rows: int
    start: int
    """First key row."""
    num_keys: int


def make_attention(
    segments: Sequence[Segment], device: torch.device, *, flashes: bool = False, goes_alone: bool = False
) -> Attend:
    """Return attention of segments.

    Args:
        flashes: FlashAttention takes the queries (`can_flash`).
        goes_alone: a long segment that sees few keys but its own goes to cuDNN by itself (`can_attend_alone`).
    """
    if not segments:
        return lambda query, _keys, _values: query
    if not flashes:
        return _attend_masked(segments, device)
    wholes, tails = split_tails(segments)
    runs: list[tuple[int, _AttendRun]] = []
    for is_alone, group in groupby(wholes, key=lambda segment: goes_alone and _is_alone(segment)):
        run = list(group)
        if is_alone:
            runs += [(segment.num_rows, _attend_alone(segment)) for segment in run]
        else:
            runs.append((sum(segment.num_rows for segment in run), _attend_in_place(run, device)))
    tail_rows = _to_tensor([row for tail in tails for row in range(tail.row, tail.row + tail.num_rows)], device)
    tail_places = (
        _find_places([(tail.num_rows, tail.start, tail.num_keys) for tail in tails], device) if tails else None
    )

    def attend_keys(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        pieces = query.split([num_rows for num_rows, _ in runs])
        parts = [run(piece, keys, values) for piece, (_, run) in zip(pieces, runs, strict=True)]
        output = torch.cat([part for part, _ in parts]) if len(parts) > 1 else parts[0][0]
        if tail_places is None:
            return output
        log_sum = torch.cat([sums for _, sums in parts], -1)
        return join_places(output, log_sum, tail_rows, *attend_cache(query[tail_rows], keys, values, tail_places))

    return attend_keys


def split_tails(segments: Sequence[Segment]) -> tuple[list[Segment], list[Tail]]:
    """Return segments with keys in one place each, and what rows see in a second one."""
    wholes, tails, row = [], [], 0
    for segment in segments:
        if len(segment.keys) == 1:
            wholes.append(segment)
        else:
            first, own = segment.keys
            wholes += [Segment(1, (first,))] * segment.num_rows
            tails.append(Tail(row, segment.num_rows, *own))
        row += segment.num_rows
    return wholes, tails


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


def _attend_alone(segment: Segment) -> _AttendRun:
    start, num_keys = segment.keys[0]
    own, num_cached = slice(start, start + num_keys), num_keys - segment.num_rows

    def attend_keys(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        # Rows that stand for those of the cached beginning: cuDNN's causal mask begins at the first key.
        square = torch.nn.functional.pad(query, (0, 0, 0, 0, num_cached, 0))
        unasked = query.new_zeros(query.shape[1], len(query), dtype=torch.float32)  # no tail belongs to these rows
        return attend_alone(square, keys[own], values[own])[num_cached:], unasked

    return attend_keys


def _attend_in_place(segments: Sequence[Segment], device: torch.device) -> _AttendRun:
    places = _find_places([(segment.num_rows, *segment.keys[0]) for segment in segments], device)
    return lambda query, keys, values: attend_cache(query, keys, values, places)


def _attend_masked(segments: Sequence[Segment], device: torch.device) -> Attend:
    """Attend with one product for the segments of a request: their first keys are the same."""
    parts: list[tuple[int, slice, Tensor]] = []
    for start, group in groupby(segments, key=lambda segment: segment.keys[0][0]):
        run = list(group)
        stop = max(first + count for segment in run for first, count in segment.keys)
        visible = torch.zeros(sum(segment.num_rows for segment in run), stop - start, dtype=torch.bool)
        row = 0
        for segment in run:
            columns = torch.cat([torch.arange(first - start, first - start + count) for first, count in segment.keys])
            seen = torch.ones(segment.num_rows, len(columns), dtype=torch.bool)
            visible[row : row + segment.num_rows, columns] = seen.tril(len(columns) - segment.num_rows)
            row += segment.num_rows
        parts.append((row, slice(start, stop), visible.to(device)))

    def attend_keys(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        outputs = []
        for piece, (_, own, visible) in zip(query.split([part[0] for part in parts]), parts, strict=True):
            heads, own_keys, own_values = (part.transpose(0, 1)[None] for part in (piece, keys[own], values[own]))
            attended = torch.nn.functional.scaled_dot_product_attention(
                heads, own_keys, own_values, attn_mask=visible, enable_gqa=True
            )
            outputs.append(attended[0].transpose(0, 1))
        return torch.cat(outputs)

    return attend_keys


def _find_places(parts: Sequence[tuple[int, int, int]], device: torch.device) -> Places:
    """Lay out (queries, first key row, keys) of segments."""
    queries, starts, lengths = zip(*parts, strict=True)
    numbers = ([0, *accumulate(queries)], [*starts, 0], lengths)
    cumulative, firsts, counts = (_to_tensor(part, device, torch.int32) for part in numbers)
    return Places(cumulative, firsts, counts, max(queries))


def _to_tensor(numbers: Sequence[int], device: torch.device, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.tensor(numbers, dtype=dtype).to(device)
