"""A kept prefix never blocks a request for which no other request will free rows."""

from __future__ import annotations

from test_scheduler import make_request, make_scheduler, run_all


def test_prefix_that_blocks_its_own_reader_is_dropped():
    """The prefix is in the middle of 96 rows, and the request that shares it needs 48: more than either side has."""
    scheduler = make_scheduler(cache_rows=96)
    own = tuple(range(3, 31))
    requests = [
        make_request("left", (1,) * 29, max_tokens=2),
        make_request("middle", own, max_tokens=3),
        make_request("reader", (*own, *([2] * 16)), max_tokens=3),
    ]
    for request in requests[:2]:
        scheduler.submit(request)
    assert set(run_all(scheduler)) == {"left", "middle"}
    scheduler.submit(requests[2])
    assert set(run_all(scheduler)) == {"reader"}
    assert scheduler.pool.num_held == 0
