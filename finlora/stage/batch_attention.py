"""Attention of a micro-batch's rows to the KV cache of a layer.

FlashAttention reads contiguous keys. Rows whose keys lie in two ranges, as those of a question's scored answers do, attend to
each range separately (`attend_tails`). Without FlashAttention the rows of a request are one product with a mask.

Shapes: T rows of a micro-batch, R rows of the cache, h heads, g key-value heads of width d.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby
from typing import NamedTuple

import torch
from torch import Tensor

from finlora.engine.micro_batch import MicroBatch, Segment
from finlora.model.layers.attention import LONG, attend_alone
from finlora.model.layers.cached_attention import KeyRanges, Tails, attend_cache, attend_tails
from finlora.stage.upload import upload

_MOST_CACHED = 0.25
"""Most cached rows, as a share of a segment's own, with which it goes to cuDNN, which recomputes them but takes half the time."""

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query (T, h, d), all cached keys of a layer (R, g, d), all values (R, g, d)) -> output (T, h, d)."""


class Tail(NamedTuple):
    """Rows of a segment whose keys lie in two ranges."""

    row: int
    """First row."""
    num_rows: int
    first: tuple[int, int]
    """First range (start, count), visible to all rows."""
    start: int
    """First key row of the second range."""
    num_keys: int
    """Keys of the second range that the last row sees; each row before sees one less."""


def make_attention(
    segments: Sequence[Segment],
    device: torch.device,
    *,
    num_padding: int = 0,
    flashes: bool = False,
    goes_alone: bool = False,
) -> Attend:
    """Return the attention function of segments.

    Args:
        num_padding: rows after the segments' own, which repeat the last one; only without FlashAttention.
        flashes: FlashAttention supports the queries (`can_flash`).
        goes_alone: a long segment with few cached keys goes to cuDNN alone (`can_attend_alone`).
    """
    if not segments:
        return lambda query, _keys, _values: query
    if not flashes:
        return _attend_masked(segments, device, num_padding)
    wholes, tails = split_tails(segments)
    runs: list[tuple[int, Attend]] = []
    for is_alone, group in groupby(wholes, key=lambda segment: goes_alone and _is_alone(segment)):
        run = list(group)
        if is_alone:
            runs += [(segment.num_rows, _attend_alone(segment)) for segment in run]
        else:
            runs.append((sum(segment.num_rows for segment in run), _attend_ranges(run, device)))
    both = _make_tails(tails, device) if tails else None

    def attend_keys(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        pieces = query.split([num_rows for num_rows, _ in runs])
        parts = [run(piece, keys, values) for piece, (_, run) in zip(pieces, runs, strict=True)]
        output = torch.cat(parts) if len(parts) > 1 else parts[0]
        return output if both is None else attend_tails(output, query, keys, values, both)

    return attend_keys


def split_tails(segments: Sequence[Segment]) -> tuple[list[Segment], list[Tail]]:
    """Return segments with one range of keys each, and the rows that have a second range.

    The answers of a question follow its prompt in the rows and in the cache, so all become one segment. Only the tails would see
    keys of other answers in it, and their output is computed again.
    """
    wholes: list[Segment] = []
    tails, row, start, stop = [], 0, -1, -1
    for segment in segments:
        (first, count), (own, num_own) = segment.keys[0], segment.keys[-1]
        if len(segment.keys) > 1:
            tails.append(Tail(row, segment.num_rows, (first, count), own, num_own))
        if first == start and own + num_own == stop + segment.num_rows:
            stop += segment.num_rows
            wholes[-1] = Segment(wholes[-1].num_rows + segment.num_rows, ((start, stop - start),))
        elif len(segment.keys) > 1:
            wholes += [Segment(1, ((first, count),))] * segment.num_rows
            start = stop = -1
        else:
            wholes.append(segment)
            start, stop = first, first + count
        row += segment.num_rows
    return wholes, tails


def _make_tails(tails: Sequence[Tail], device: torch.device) -> Tails:
    """Put tails into the tensors of `attend_tails`."""
    numbers = zip(*(row for tail in tails for row in list_rows(tail)), strict=True)
    rows, starts, counts = (upload(column, device) for column in numbers)
    most = max(tail.num_keys for tail in tails)
    return Tails(rows, _lay_out_ranges(group_tails(tails), device), starts, counts, most)


def list_rows(tail: Tail) -> list[tuple[int, int, int]]:
    """Return (row, first key row in the second range, keys there) of each row."""
    before = tail.num_keys - tail.num_rows
    return [(tail.row + offset, tail.start, before + offset + 1) for offset in range(tail.num_rows)]


def group_tails(tails: Sequence[Tail]) -> list[tuple[int, int, int]]:
    """Return (rows, first key row, keys) of each run of tails with the same first range."""
    groups = groupby(tails, key=lambda tail: tail.first)
    return [(sum(tail.num_rows for tail in group), *first) for first, group in groups]


def narrow(batch: MicroBatch, rows: Sequence[int]) -> tuple[list[Segment], list[tuple[str | None, int]]]:
    """Return segments and adapters of some rows of a micro-batch, each row a segment of its own.

    Args:
        rows: ascending.
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
    """Return a segment's keys without the last `num_unseen`."""
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
    own = slice(start, start + num_keys)
    return lambda query, keys, values: attend_alone(query, keys[own], values[own])


def _attend_ranges(segments: Sequence[Segment], device: torch.device) -> Attend:
    ranges = _lay_out_ranges([(segment.num_rows, *segment.keys[0]) for segment in segments], device)
    return lambda query, keys, values: attend_cache(query, keys, values, ranges)[0]


def _attend_masked(segments: Sequence[Segment], device: torch.device, num_padding: int) -> Attend:
    """Return attention by one masked product for the segments of a request, which share their first keys."""
    parts: list[tuple[int, slice, Tensor | None]] = []
    for start, group in groupby(segments, key=lambda segment: segment.keys[0][0]):
        run = list(group)
        if len(run) == run[0].num_rows == len(run[0].keys) == 1:  # a next token sees all its keys: no mask
            parts.append((1, slice(start, start + run[0].keys[0][1]), None))
            continue
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
        pieces = query[: len(query) - num_padding].split([part[0] for part in parts])
        for piece, (_, own, visible) in zip(pieces, parts, strict=True):
            heads, own_keys, own_values = (part.transpose(0, 1)[None] for part in (piece, keys[own], values[own]))
            attended = torch.nn.functional.scaled_dot_product_attention(
                heads, own_keys, own_values, attn_mask=visible, enable_gqa=True
            )
            outputs.append(attended[0].transpose(0, 1))
        outputs += [outputs[-1][-1:]] * num_padding
        return torch.cat(outputs)

    return attend_keys


def _lay_out_ranges(parts: Sequence[tuple[int, int, int]], device: torch.device) -> KeyRanges:
    """Put (queries, first key row, keys) of segments into tensors."""
    queries, starts, lengths = zip(*parts, strict=True)
    numbers = ([0, *accumulate(queries)], [*starts, 0], lengths)
    cumulative, firsts, counts = (upload(part, device, torch.int32) for part in numbers)
    return KeyRanges(cumulative, firsts, counts, max(queries))
