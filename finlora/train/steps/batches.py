"""Split of a worker's share of a global batch into forward passes: padded rows, or packs without padding.

The loss of a step is the same sum over the same answer tokens either way; only memory and speed differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from finlora.data.encode import Batch, Encoded, collate
from finlora.data.pack_size import form_of, pad_pack
from finlora.data.packing import Form, Pack, pack_examples, split_by_tokens

_MOST_FORESEEN = 1024
"""Packs whose forms are counted before the first step, some 0.1 ms each. In a longer run each form comes back often enough."""


class Batches(Protocol):
    """Splits a share of example indices into forward passes and assembles each of them on the host."""

    def foresee(self, shares: Iterable[Sequence[int]], examples: Sequence[Encoded]) -> None: ...

    def cut(self, share: Sequence[int]) -> list[list[int]]: ...

    def assemble(self, items: Sequence[Encoded]) -> Batch | Pack: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatches:
    """Rows padded to the longest of `micro_batch_size` examples."""

    micro_batch_size: int
    pad_token_id: int

    def foresee(self, shares: Iterable[Sequence[int]], examples: Sequence[Encoded]) -> None:
        """Do nothing: padded rows are never captured."""

    def cut(self, share: Sequence[int]) -> list[list[int]]:
        size = self.micro_batch_size
        return [list(share[start : start + size]) for start in range(0, len(share), size)]

    def assemble(self, items: Sequence[Encoded]) -> Batch:
        return collate(items, self.pad_token_id)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatches:
    """Examples end to end, at most `max_tokens` tokens a pack."""

    max_tokens: int
    lengths: Sequence[int]
    """Tokens of every example of the training set."""
    share_prefix: bool
    is_padded: bool
    """Round sizes up, so that captured CUDA graphs can be replayed (finlora/model/layers/training_graphs.py)."""
    upcoming: Counter[Form] = field(default_factory=Counter, compare=False)
    """Packs of each form that are still to come in a short run; empty: not counted."""

    def foresee(self, shares: Iterable[Sequence[int]], examples: Sequence[Encoded]) -> None:
        """Count the forms of a worker's packs in the steps to come.

        Args:
            shares: example indices of each step.
        """
        self.upcoming.clear()
        if not self.is_padded:
            return
        packs = list(islice((pack for share in shares for pack in self.cut(share)), _MOST_FORESEEN + 1))
        if len(packs) <= _MOST_FORESEEN:
            forms = (form_of([examples[index] for index in pack], share_prefix=self.share_prefix) for pack in packs)
            self.upcoming.update(forms)

    def cut(self, share: Sequence[int]) -> list[list[int]]:
        return split_by_tokens(share, self.lengths, self.max_tokens)

    def assemble(self, items: Sequence[Encoded]) -> Pack:
        pack = pack_examples(items, share_prefix=self.share_prefix)
        return pad_pack(pack) if self.is_padded else pack
