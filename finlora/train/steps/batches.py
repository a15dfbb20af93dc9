"""Split of a worker's share of a global batch into forward passes: padded rows, or packs without padding.

The loss of a step is the same sum over the same answer tokens either way; only memory and speed differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from finlora.data.encode import Batch, Encoded, collate
from finlora.data.pack_size import pad_pack
from finlora.data.packing import Pack, pack_examples, split_by_tokens


class Batches(Protocol):
    """Splits a share of example indices into forward passes and assembles each of them on the host."""

    def cut(self, share: Sequence[int]) -> list[list[int]]: ...

    def assemble(self, items: Sequence[Encoded]) -> Batch | Pack: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedBatches:
    """Rows padded to the longest of `micro_batch_size` examples."""

    micro_batch_size: int
    pad_token_id: int

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

    def cut(self, share: Sequence[int]) -> list[list[int]]:
        return split_by_tokens(share, self.lengths, self.max_tokens)

    def assemble(self, items: Sequence[Encoded]) -> Pack:
        pack = pack_examples(items, share_prefix=self.share_prefix)
        return pad_pack(pack) if self.is_padded else pack
