"""A minute's worth of requests and tokens, with a clock by hand."""

from __future__ import annotations

import pytest

from finlora.errors import QuotaError
from finlora.serve.keys import KeyRecord
from finlora.serve.quota import Quota


def make_key(name="a", **limits):
    return KeyRecord(id=name, salt="s", hash="0" * 64, **limits)


@pytest.fixture
def clock():
    return [0.0]


@pytest.fixture
def quota(clock):
    return Quota(lambda: clock[0])


def test_requests_come_back_evenly_over_the_minute(quota, clock):
    key = make_key(requests_per_minute=4)
    for _ in range(4):
        quota.take_request(key)
    with pytest.raises(QuotaError, match=r"key 'a' may use 4 requests a minute.*ask again in 15 s") as refused:
        quota.take_request(key)
    assert refused.value.retry_after_s == 15
    clock[0] = 15.0
    quota.take_request(key)
    with pytest.raises(QuotaError):
        quota.take_request(key)
    clock[0] = 1e6
    for _ in range(4):
        quota.take_request(key)
    with pytest.raises(QuotaError):
        quota.take_request(key)


def test_tokens_beyond_the_minute_are_missing_from_the_next(quota, clock):
    key = make_key(tokens_per_minute=60)
    quota.take_request(key)
    quota.take_tokens(key, 100)
    with pytest.raises(QuotaError, match=r"60 tokens a minute.*in 41 s"):
        quota.take_request(key)
    clock[0] = 41.0
    quota.take_request(key)


def test_keys_do_not_share_and_no_limit_is_none(quota):
    quota.take_request(make_key("a", requests_per_minute=1))
    quota.take_request(make_key("b", requests_per_minute=1))
    for _ in range(1000):
        quota.take_request(make_key("c"))
        quota.take_tokens(make_key("c"), 10**6)
