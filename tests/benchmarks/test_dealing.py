"""Share of a step in which workers compute, on lengths that are shared by hand."""

from __future__ import annotations

import pytest
from dealing import DEALS, measure

# One batch of an epoch; its order is the sampler's, so all that is long stands for itself.
LENGTHS = (90, 10, 10, 10)


def test_one_worker_never_waits():
    assert [measure(LENGTHS, 1, 4, 3, deal) for deal in DEALS.values()] == [1.0, 1.0]


def test_long_example_is_left_as_alone_as_an_even_deal_allows():
    """Two examples each: (90, 10) and (10, 10) in any order, so (100 + 20) / 2 over 100."""
    assert [measure(LENGTHS, 2, 4, 3, deal) for deal in DEALS.values()] == pytest.approx([0.6, 0.6])


def test_deal_by_length_evens_out_what_the_order_does_not():
    lengths = [10, 20, 30, 40] * 8
    in_turn, by_length = (measure(lengths, 4, 16, 20, deal) for deal in DEALS.values())
    assert in_turn < by_length
    assert by_length > 0.95
