"""Pack ragged examples end to end without padding, with their common beginning in it once.

Shapes: n examples of a pack, P tokens of the shared prefix (0: none), T rows of the pack, S key rows that attention
reads, N labelled places. Rows: the prefix first, then each example's own tokens, in order. The last token of an example,
its end token, predicts nothing and is left out, so the N places that predict an answer are the last rows of their example.

Every example attends to the prefix and to itself, never to a neighbour, and its positions go on where the prefix ends: it
sees what it would see alone. Without dropout the result is the padded batch's; with dropout, the examples of a pack share
the masks of the prefix' rows instead of drawing one each, which leaves the expectation of the gradient as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from finlora.data.encode import IGNORED, Encoded

if TYPE_CHECKING:
    import torch

MIN_SHARED_PREFIX = 8
"""Tokens of common beginning below which sharing costs more than it saves."""
_PLACES_STEP = 16


@dataclass(frozen=True, slots=True)
class Segments:
    """Which query rows attend to which key rows: segment i is causal, its last query aligned with its last key."""

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    max_queries: int
    """At least the longest query length: kernels are launched for it."""
    max_keys: int
    cumulative_queries: torch.Tensor
    """(segments + 1,) int32."""
    cumulative_keys: torch.Tensor
    """(segments + 1,) int32."""
    key_rows: torch.Tensor | None
    """(S,) int64: the pack's row of each key; None where keys are the pack's rows as they stand."""
    prefix_slots: torch.Tensor | None
    """(segments, P) int64: where each segment's copy of the prefix lies among the S keys; None without a prefix."""
    own_slots: torch.Tensor | None
    """(T - P,) int64: where the rows after the prefix lie among the S keys; None without a prefix."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Examples of one forward pass."""

    input_ids: torch.Tensor
    """(T,) int64."""
    positions: torch.Tensor
    """(T,) int64, from 0 for each example with its prefix."""
    places: torch.Tensor
    """(N,) int64: rows that predict an answer token."""
    targets: torch.Tensor
    """(N,) int64: the token each of them predicts; IGNORED at padding."""
    segments: Segments
    """All rows as queries."""
    last_segments: Segments
    """Only the N places as queries: what the last layer needs."""
    num_tokens: int
    """Real tokens of the examples, as a padded batch counts them."""

    def to(self, device: torch.device) -> Pack:
        """Move every tensor; from pinned memory without waiting."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def tensors(self) -> list[torch.Tensor]:
        """Return every tensor in a fixed order."""
        found: list[torch.Tensor] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            found.append(tensor)
            return tensor

        map_tensors(self, keep)
        return found

    @property
    def form(self) -> tuple[object, ...]:
        """What must be equal for a captured forward and backward pass to serve another pack: all sizes, no contents."""
        limits = [(part.max_queries, part.max_keys) for part in (self.segments, self.last_segments)]
        return (*limits, *(tuple(tensor.shape) for tensor in self.tensors()))


_T = TypeVar("_T", Segments, Pack)


def map_tensors(record: _T, change: Callable[[torch.Tensor], torch.Tensor]) -> _T:
    """Return the record with every tensor changed, those of its segments too."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Segments):
            changed[item.name] = map_tensors(value, change)
        elif hasattr(value, "to"):
            changed[item.name] = change(value)
    return dataclasses.replace(record, **changed)


def split_by_tokens(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Cut a worker's share of a batch into packs, in order, so that the same batch always gives the same packs.

    Args:
        indices: example indices.
        lengths: tokens of every example of the set, by index.
        max_tokens: most tokens a pack; a longer example is a pack of its own.
    """
    packs: list[list[int]] = []
    used = 0
    for index in indices:
        if not packs or used + lengths[index] > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append(index)
        used += lengths[index]
    return packs


def shared_prefix_length(items: Sequence[Encoded]) -> int:
    """Return how many tokens all prompts begin with; at least one token of each prompt is left to itself."""
    if len(items) < 2:
        return 0
    low, high = min(item.prompt_ids for item in items), max(item.prompt_ids for item in items)
    limit = min(len(item.prompt_ids) for item in items) - 1
    length = 0
    while length < limit and low[length] == high[length]:
        length += 1
    return length


def pack_examples(items: Sequence[Encoded], *, share_prefix: bool) -> Pack:
    """Lay examples end to end.

    Args:
        items: at least one.
        share_prefix: compute the common beginning once, where it is at least MIN_SHARED_PREFIX tokens.
    """
    import torch

    prefix = shared_prefix_length(items) if share_prefix else 0
    prefix = prefix if prefix >= MIN_SHARED_PREFIX else 0
    ids = list(items[0].prompt_ids[:prefix])
    positions = list(range(prefix))
    places: list[int] = []
    targets: list[int] = []
    own_lengths: list[int] = []
    for item in items:
        own = (item.prompt_ids + item.answer_ids)[prefix:-1]
        num_answer = len(item.answer_ids)
        places += range(len(ids) + len(own) - num_answer, len(ids) + len(own))
        ids += own
        positions += range(prefix, prefix + len(own))
        targets += item.answer_ids
        own_lengths.append(len(own))
    answers = [len(item.answer_ids) for item in items]
    return Pack(
        input_ids=_pinned(torch.tensor(ids)),
        positions=_pinned(torch.tensor(positions)),
        places=_pinned(torch.tensor(places)),
        targets=_pinned(torch.tensor(targets)),
        segments=_make_segments(own_lengths, own_lengths, prefix, has_prefix_queries=prefix > 0),
        last_segments=_make_segments(answers, own_lengths, prefix, has_prefix_queries=False),
        num_tokens=sum(item.num_tokens for item in items),
    )


def pad_pack(pack: Pack) -> Pack:
    """Round the sizes of a pack up, so that few forms serve many packs: at most an eighth more rows, 4 % in the mean.

    The padding is a segment of its own that nobody attends to, and its places carry IGNORED.
    """
    import torch

    num_rows, num_places = len(pack.input_ids), len(pack.places)
    more_places = _PLACES_STEP - num_places % _PLACES_STEP
    step = max(16, 1 << max(0, (num_rows + more_places).bit_length() - 5))
    more_rows = -(-(num_rows + more_places) // step) * step - num_rows

    def pad(tensor: torch.Tensor, size: int, value: int) -> torch.Tensor:
        return _pinned(torch.nn.functional.pad(tensor, (0, size), value=value))

    return Pack(
        input_ids=pad(pack.input_ids, more_rows, 0),
        positions=pad(pack.positions, more_rows, 0),
        places=_pinned(torch.cat([pack.places, torch.arange(more_places) + num_rows + more_rows - more_places])),
        targets=pad(pack.targets, more_places, IGNORED),
        segments=_pad_segments(pack.segments, more_rows, more_rows, num_rows),
        last_segments=_pad_segments(pack.last_segments, more_places, more_rows, num_rows),
        num_tokens=pack.num_tokens,
    )


def _pad_segments(segments: Segments, queries: int, keys: int, start: int) -> Segments:
    """Add one segment of padding, whose keys are the pack's rows from `start`."""
    import torch

    query_lengths, key_lengths = (*segments.query_lengths, queries), (*segments.key_lengths, keys)
    rows = torch.arange(start, start + keys)
    key_rows, own_slots = segments.key_rows, segments.own_slots
    if key_rows is not None and own_slots is not None:
        own_slots = _pinned(torch.cat([own_slots, torch.arange(keys) + len(key_rows)]))
        key_rows = _pinned(torch.cat([key_rows, rows]))
    return dataclasses.replace(
        segments,
        query_lengths=query_lengths,
        key_lengths=key_lengths,
        max_queries=1 << (max(query_lengths) - 1).bit_length(),
        max_keys=1 << (max(key_lengths) - 1).bit_length(),
        cumulative_queries=_pinned(_cumulate(query_lengths)),
        cumulative_keys=_pinned(_cumulate(key_lengths)),
        key_rows=key_rows,
        own_slots=own_slots,
    )


def _make_segments(
    query_lengths: Sequence[int], own_lengths: Sequence[int], prefix: int, *, has_prefix_queries: bool
) -> Segments:
    """Build the segments of all examples, and before them one of the prefix itself where it has queries of its own."""
    import torch

    queries, keys = list(query_lengths), [prefix + own for own in own_lengths]
    key_rows: list[int] = []
    prefix_slots: list[int] = []
    own_slots: list[int] = []
    if has_prefix_queries:
        queries, keys = [prefix, *queries], [prefix, *keys]
        key_rows += range(prefix)
        prefix_slots += range(prefix)
    start = prefix
    for own in own_lengths:
        prefix_slots += range(len(key_rows), len(key_rows) + prefix)
        key_rows += range(prefix)
        own_slots += range(len(key_rows), len(key_rows) + own)
        key_rows += range(start, start + own)
        start += own
    return Segments(
        query_lengths=tuple(queries),
        key_lengths=tuple(keys),
        max_queries=max(queries),
        max_keys=max(keys),
        cumulative_queries=_pinned(_cumulate(queries)),
        cumulative_keys=_pinned(_cumulate(keys)),
        key_rows=_pinned(torch.tensor(key_rows)) if prefix else None,
        prefix_slots=_pinned(torch.tensor(prefix_slots).view(-1, prefix)) if prefix else None,
        own_slots=_pinned(torch.tensor(own_slots)) if prefix else None,
    )


def _cumulate(lengths: Sequence[int]) -> torch.Tensor:
    import torch

    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Pin host memory where there is a GPU, so that the copy to it does not make the host wait."""
    import torch

    return tensor.pin_memory() if torch.cuda.is_available() else tensor
