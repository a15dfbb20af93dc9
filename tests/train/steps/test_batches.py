"""Forward passes of a share: each example exactly once, for any split."""

from __future__ import annotations

from collections import Counter

import pytest

from finlora.data.encode import Encoded
from finlora.data.packing import Pack
from finlora.train.steps.batches import PackedBatches, PaddedBatches

EXAMPLES = [Encoded(tuple(range(4 + n)), (90, 91)) for n in range(9)]
LENGTHS = [item.num_tokens for item in EXAMPLES]
SHARE = [8, 2, 5, 0, 7]


def packed(max_tokens, is_padded=False):
    return PackedBatches(max_tokens=max_tokens, lengths=LENGTHS, share_prefix=True, is_padded=is_padded)


@pytest.mark.parametrize(
    "batches", [PaddedBatches(micro_batch_size=2, pad_token_id=0), packed(1), packed(20), packed(10_000)]
)
def test_cut_keeps_every_example_once_and_in_order(batches):
    assert [index for part in batches.cut(SHARE) for index in part] == SHARE
    assert batches.cut([]) == []
    whole = sum(LENGTHS[index] for index in SHARE)
    parts = [batches.assemble([EXAMPLES[index] for index in part]) for part in batches.cut(SHARE)]
    assert sum(part.num_tokens for part in parts) == whole


def test_packs_are_full_but_never_over_the_limit():
    limit = 20
    parts = packed(limit).cut(SHARE)
    totals = [sum(LENGTHS[index] for index in part) for part in parts]
    assert max(totals) <= limit
    # No pack could have taken the first example of the next one.
    assert all(total + LENGTHS[after[0]] > limit for total, after in zip(totals, parts[1:], strict=False))


def test_example_over_the_limit_is_a_pack_of_its_own():
    assert packed(9).cut([8, 0, 7]) == [[8], [0], [7]]


def test_padded_rows_are_as_long_as_the_longest():
    batch = PaddedBatches(micro_batch_size=3, pad_token_id=7).assemble([EXAMPLES[0], EXAMPLES[4]])
    assert batch.input_ids.shape == (2, LENGTHS[4])
    assert batch.input_ids[0, LENGTHS[0] :].unique().tolist() == [7]


def test_sizes_are_rounded_only_where_passes_are_captured():
    plain, rounded = (packed(100, is_padded=flag).assemble(EXAMPLES[:3]) for flag in (False, True))
    assert isinstance(plain, Pack)
    assert len(rounded.input_ids) % 16 == 0
    assert len(plain.input_ids) < len(rounded.input_ids)
    assert plain.num_tokens == rounded.num_tokens


def test_forms_to_come_are_counted_where_passes_are_captured():
    batches = packed(20, is_padded=True)
    shares = [[0, 1], [2], [0, 1], [8, 7]]
    batches.foresee(shares, EXAMPLES)
    forms = [
        batches.assemble([EXAMPLES[index] for index in pack]).form for share in shares for pack in batches.cut(share)
    ]
    assert batches.upcoming == Counter(forms)
    assert batches.upcoming[forms[0]] >= 2
    batches.foresee(shares[1:2], EXAMPLES)
    assert batches.upcoming.total() == 1
    plain = packed(20, is_padded=False)
    plain.foresee(shares, EXAMPLES)
    assert not plain.upcoming


def test_forms_of_a_long_run_are_not_counted(monkeypatch):
    """Counting takes time itself, and there each form comes back often enough."""
    monkeypatch.setattr("finlora.train.steps.batches._MOST_FORESEEN", 3)
    batches = packed(10_000, is_padded=True)
    batches.foresee([[0]] * 3, EXAMPLES)
    assert batches.upcoming.total() == 3
    batches.foresee([[0]] * 4, EXAMPLES)
    assert not batches.upcoming
