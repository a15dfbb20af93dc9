"""Packing of examples end to end without padding, with their shared prefix once.

Shapes: n examples of a pack, P tokens of the shared prefix (0: none), T rows of the pack, S key rows that attention
reads, N labelled positions. Rows: the prefix first, then each example's own tokens, in order. The last token of an example,
its end token, predicts nothing and is left out, so the N positions that predict an answer are the last rows of their example.

Every example attends to the prefix and to itself, never to a neighbour, and its sequence positions continue after the prefix: it
sees the same tokens as alone. Without dropout the result equals the padded batch's; with dropout, the examples of a pack
share the dropout masks of the prefix rows, which leaves the expectation of the gradient unchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from finlora.data.encode import Encoded, stack_weights

if TYPE_CHECKING:
    import torch

MIN_SHARED_PREFIX = 8
"""Prefix tokens below which sharing costs more than it saves."""
_LONG_EXAMPLE, _MIN_SHARE = 1024, 1 / 16
"""Share of tokens that sharing must save where examples are long: attention is faster without (model/layers/attention.py)."""


Form = tuple[tuple[int, ...], ...]
"""All sizes that packs of one CUDA graph must share."""


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
    """(S,) int64: the pack's row of each key; None if the keys are the pack's rows in order."""
    prefix_slots: torch.Tensor | None
    """(segments, P) int64: indices of each segment's copy of the prefix among the S keys; None without a prefix."""
    own_slots: torch.Tensor | None
    """(T - P,) int64: indices of the rows after the prefix among the S keys; None without a prefix."""


@dataclass(frozen=True, slots=True)
class Pack:
    """Examples of one forward pass."""

    input_ids: torch.Tensor
    """(T,) int64."""
    positions: torch.Tensor
    """(T,) int64, from 0 for each example with its prefix."""
    label_rows: torch.Tensor
    """(N,) int64: rows that predict an answer token."""
    targets: torch.Tensor
    """(N,) int64: the token that each label row predicts; IGNORED at padding."""
    segments: Segments
    """Attention with all rows as queries."""
    last_segments: Segments
    """Attention with only the N label rows as queries, which is enough in the last layer."""
    num_tokens: int
    """Tokens of the examples as a padded batch counts them, without padding."""
    weights: torch.Tensor | None = None
    """(N,) float32 factors of the targets' loss; None: all 1."""

    def to(self, device: torch.device) -> Pack:
        """Copy every tensor to a device; from pinned memory asynchronously."""
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
    def form(self) -> Form:
        """All sizes that packs of one CUDA graph must share."""
        limits = [(part.max_queries, part.max_keys) for part in (self.segments, self.last_segments)]
        return (*limits, *(tuple(tensor.shape) for tensor in self.tensors()))


_T = TypeVar("_T", Segments, Pack)


def map_tensors(record: _T, change: Callable[[torch.Tensor], torch.Tensor]) -> _T:
    """Return the record with `change` applied to every tensor, including its segments'."""
    changed: dict[str, Any] = {}
    for item in dataclasses.fields(record):
        value = getattr(record, item.name)
        if isinstance(value, Segments):
            changed[item.name] = map_tensors(value, change)
        elif hasattr(value, "to"):
            changed[item.name] = change(value)
    return dataclasses.replace(record, **changed)


def split_by_tokens(indices: Sequence[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split a worker's share of a batch into packs, in order: the same batch always gives the same packs.

    Args:
        indices: example indices.
        lengths: tokens of every example of the set, by index.
        max_tokens: most tokens a pack; a longer example gets its own pack.
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
    """Return the length of the prefix that all prompts share, at least one token shorter than the shortest prompt."""
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
        share_prefix: compute the shared prefix once if it has at least MIN_SHARED_PREFIX tokens.
    """
    import torch

    prefix = prefix_to_share(items, share_prefix)
    ids = list(items[0].prompt_ids[:prefix])
    positions = list(range(prefix))
    label_rows: list[int] = []
    targets: list[int] = []
    own_lengths: list[int] = []
    for item in items:
        own = (item.prompt_ids + item.answer_ids)[prefix:-1]
        num_answer = len(item.answer_ids)
        label_rows += range(len(ids) + len(own) - num_answer, len(ids) + len(own))
        ids += own
        positions += range(prefix, prefix + len(own))
        targets += item.answer_ids
        own_lengths.append(len(own))
    answers = [len(item.answer_ids) for item in items]
    return Pack(
        input_ids=pinned(torch.tensor(ids)),
        positions=pinned(torch.tensor(positions)),
        label_rows=pinned(torch.tensor(label_rows)),
        targets=pinned(torch.tensor(targets)),
        segments=_make_segments(own_lengths, own_lengths, prefix, has_prefix_queries=prefix > 0),
        last_segments=_make_segments(answers, own_lengths, prefix, has_prefix_queries=False),
        num_tokens=sum(item.num_tokens for item in items),
        weights=None if (weights := stack_weights(items, repeats=True)) is None else pinned(weights),
    )


def prefix_to_share(items: Sequence[Encoded], share_prefix: bool) -> int:
    """Return the length of the prefix that a pack of the examples shares; 0: none."""
    prefix = shared_prefix_length(items) if share_prefix else 0
    num_tokens = sum(item.num_tokens for item in items)
    if num_tokens >= _LONG_EXAMPLE * len(items) and prefix * (len(items) - 1) < _MIN_SHARE * num_tokens:
        return 0
    return prefix if prefix >= MIN_SHARED_PREFIX else 0


def _make_segments(
    query_lengths: Sequence[int], own_lengths: Sequence[int], prefix: int, *, has_prefix_queries: bool
) -> Segments:
    """Build the segments of all examples, preceded by the prefix's segment if the prefix has queries."""
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
        cumulative_queries=pinned(cumulate(queries)),
        cumulative_keys=pinned(cumulate(keys)),
        key_rows=pinned(torch.tensor(key_rows)) if prefix else None,
        prefix_slots=pinned(torch.tensor(prefix_slots).view(-1, prefix)) if prefix else None,
        own_slots=pinned(torch.tensor(own_slots)) if prefix else None,
    )


def cumulate(lengths: Sequence[int]) -> torch.Tensor:
    """Return each segment's start and the end, in FlashAttention's form. Shapes: n lengths -> (n + 1,) int32."""
    import torch

    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Pin host memory if there is a GPU, so that the host does not wait for the copy."""
    import torch

    return tensor.pin_memory() if torch.cuda.is_available() else tensor
