"""Sizes of packs before they are built, rounded up so that few CUDA graphs serve many packs.

Shapes as in finlora/data/packing.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from finlora.data.encode import IGNORED, Encoded, stack_weights
from finlora.data.packing import Form, Pack, Segments, cumulate, pinned, prefix_to_share

MAX_CAPTURED_ROWS = 4096
"""Rows above which a pass is not captured as a CUDA graph: it keeps the GPU busy for longer than its launches take."""
_LABELS_STEP = 16
_ROWS_STEP = 64
"""Row step of packs that are not captured; matrix products compute whole blocks of rows anyway."""
_LEAST_LIMIT = 256
"""Fewest queries and keys a segment that attention's kernels are launched for; blocks without any end at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackSize:
    """Size of a pack that is not built yet."""

    num_rows: int
    """T."""
    num_labels: int
    """N."""


def measure_pack(items: Sequence[Encoded], *, share_prefix: bool, is_padded: bool) -> PackSize:
    """Return the size of the pack that `pack_examples`, and if padded `pad_pack`, would build."""
    prefix = prefix_to_share(items, share_prefix)
    num_labels = sum(len(item.answer_ids) for item in items)
    num_rows = prefix + sum(item.num_tokens - 1 - prefix for item in items)
    more_rows, more_labels = _count_padding(num_rows, num_labels) if is_padded else (0, 0)
    return PackSize(num_rows=num_rows + more_rows, num_labels=num_labels + more_labels)


def most_tokens(num_rows: int) -> int:
    """Return the most tokens whose padded pack has at most `num_rows` rows in every case."""
    padding = _ROWS_STEP + _LABELS_STEP
    if num_rows > MAX_CAPTURED_ROWS + padding:
        return num_rows - padding
    return int(min(num_rows, MAX_CAPTURED_ROWS) * 16 / 17)


def pad_pack(pack: Pack) -> Pack:
    """Round the sizes of a pack up, so that few graphs serve many packs.

    Adds about a sixteenth of the rows at most; above MAX_CAPTURED_ROWS, where no graph is used, less than `_ROWS_STEP` rows.
    The padding is a separate segment that no example attends to, and its labels are IGNORED.
    """
    import torch

    num_rows = len(pack.input_ids)
    more_rows, more_labels = _count_padding(num_rows, len(pack.label_rows))

    def pad(tensor: torch.Tensor, size: int, value: int) -> torch.Tensor:
        return pinned(torch.nn.functional.pad(tensor, (0, size), value=value))

    return Pack(
        input_ids=pad(pack.input_ids, more_rows, 0),
        positions=pad(pack.positions, more_rows, 0),
        label_rows=pinned(torch.cat([pack.label_rows, torch.arange(more_labels) + num_rows + more_rows - more_labels])),
        targets=pad(pack.targets, more_labels, IGNORED),
        segments=_pad_segments(pack.segments, more_rows, more_rows, num_rows),
        last_segments=_pad_segments(pack.last_segments, more_labels, more_rows, num_rows),
        num_tokens=pack.num_tokens,
        weights=None if pack.weights is None else pad(pack.weights, more_labels, 0),
    )


def form_of(items: Sequence[Encoded], *, share_prefix: bool) -> Form:
    """Return `Pack.form` of the padded pack of examples, without building it."""
    prefix = prefix_to_share(items, share_prefix)
    size = measure_pack(items, share_prefix=share_prefix, is_padded=True)
    own_lengths = [item.num_tokens - 1 - prefix for item in items]
    answers = [len(item.answer_ids) for item in items]
    own_rows, num_labels = sum(own_lengths), sum(answers)
    more_rows, more_labels = size.num_rows - prefix - own_rows, size.num_labels - num_labels
    rows, labels, num_items = (size.num_rows,), (size.num_labels,), len(items)
    queries, keys = [*own_lengths, more_rows], [*(prefix + own for own in own_lengths), more_rows]
    parts: Form
    last_parts: Form
    if not prefix:
        parts = last_parts = ((num_items + 2,), (num_items + 2,))
    else:
        queries.append(prefix)
        last_keys = num_items * prefix + own_rows + more_rows
        own_slots = (own_rows + more_rows,)
        ends, last_ends = ((num_items + 3,),) * 2, ((num_items + 2,),) * 2
        parts = (*ends, (prefix + last_keys,), (num_items + 1, prefix), own_slots)
        last_parts = (*last_ends, (last_keys,), (num_items, prefix), own_slots)
    limits = ((_limit(queries), _limit(keys)), (_limit([*answers, more_labels]), _limit(keys)))
    weights = () if stack_weights(items, repeats=True) is None else (labels,)
    return (*limits, rows, rows, labels, labels, *parts, *last_parts, *weights)


def _limit(lengths: Sequence[int]) -> int:
    """Return the number of queries or keys of a segment that attention's kernels are launched for."""
    return max(_LEAST_LIMIT, 1 << (max(lengths) - 1).bit_length())


def _count_padding(num_rows: int, num_labels: int) -> tuple[int, int]:
    """Return the rows and labelled positions that `pad_pack` adds."""
    more_labels = _LABELS_STEP - num_labels % _LABELS_STEP
    step = max(16, 1 << max(0, (num_rows + more_labels).bit_length() - 5))
    if num_rows + more_labels > MAX_CAPTURED_ROWS:
        step = _ROWS_STEP
    return -(-(num_rows + more_labels) // step) * step - num_rows, more_labels


def _pad_segments(segments: Segments, queries: int, keys: int, start: int) -> Segments:
    """Add one segment of padding, whose keys are the pack's rows from `start`."""
    import torch

    query_lengths, key_lengths = (*segments.query_lengths, queries), (*segments.key_lengths, keys)
    rows = torch.arange(start, start + keys)
    key_rows, own_slots = segments.key_rows, segments.own_slots
    if key_rows is not None and own_slots is not None:
        own_slots = pinned(torch.cat([own_slots, torch.arange(keys) + len(key_rows)]))
        key_rows = pinned(torch.cat([key_rows, rows]))
    return dataclasses.replace(
        segments,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        max_queries=_limit(query_lengths),
        max_keys=_limit(key_lengths),
        cumulative_queries=pinned(cumulate(query_lengths)),
        cumulative_keys=pinned(cumulate(key_lengths)),
        key_rows=key_rows,
        own_slots=own_slots,
    )
