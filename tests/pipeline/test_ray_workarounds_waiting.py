"""Pauses between reads of a compiled graph's channels; test_pipeline.py measures the load of waiting stages."""

from __future__ import annotations

import pytest
from ray.exceptions import RayChannelTimeoutError
from ray.experimental.channel.shared_memory_channel import CompositeChannel

from finlora.pipeline import ray_workarounds
from finlora.pipeline.ray_workarounds import EAGER_S, wait_with_pauses


class Channel:
    """Channel whose message is ready at a given time; records the timeout of each read."""

    def __init__(self, ready_at):
        self.ready_at, self.asked = ready_at, []


@pytest.fixture
def clock(monkeypatch):
    """Fake clock that advances only during waits."""

    class Clock:
        def __init__(self):
            self.now, self.pauses = 100.0, []

        def monotonic(self):
            return self.now

        def sleep(self, seconds):
            self.pauses.append(seconds)
            self.now += seconds

    own = Clock()
    monkeypatch.setattr(ray_workarounds, "time", own)
    return own


@pytest.fixture
def make_read(clock):
    def plain(channel, timeout):
        channel.asked.append(timeout)
        if clock.now + timeout < channel.ready_at:
            clock.now += timeout
            raise RayChannelTimeoutError("not yet")
        clock.now = max(clock.now, channel.ready_at)
        return "message"

    return lambda eager_s: ray_workarounds._pausing(plain, eager_s, 1e-3)


def test_message_that_comes_soon_is_read_without_pauses(make_read, clock):
    assert make_read(0.25)(Channel(clock.now + 0.2), -1) == "message"
    assert clock.pauses == []


@pytest.mark.parametrize(("wait", "most"), [(0.004, 0.0005), (5.0, 0.001)])
def test_pauses_are_a_tenth_of_the_wait_and_bounded(make_read, clock, wait, most):
    ready_at = clock.now + wait
    assert make_read(0.0)(Channel(ready_at), None) == "message"
    assert clock.pauses[0] == 5e-5
    assert max(clock.pauses) <= most
    assert clock.now - ready_at <= min(0.1 * wait, 0.001) + 5e-5


def test_consecutive_timeouts_count_as_one_wait(make_read, clock):
    """Ray reads with a timeout of 0.1 s, again and again; only the first 0.25 s are without pauses."""
    read, channel = make_read(0.25), Channel(clock.now + 0.65)
    for _ in range(6):
        with pytest.raises(RayChannelTimeoutError):
            read(channel, 0.1)
    assert read(channel, 0.1) == "message"
    assert sum(channel.asked) == pytest.approx(0.25, abs=0.01)
    channel.ready_at, channel.asked = clock.now + 0.2, []
    assert read(channel, -1) == "message"  # the next wait starts from zero
    assert channel.asked == [0.25]


def test_timeout_is_kept(make_read, clock):
    until = clock.now + 0.3
    with pytest.raises(RayChannelTimeoutError):
        make_read(0.0)(Channel(until + 1), 0.3)
    assert until <= clock.now <= until + 0.001


def test_second_call_replaces_the_first(monkeypatch):
    plain = getattr(CompositeChannel.read, "__wrapped__", CompositeChannel.read)
    monkeypatch.setattr(CompositeChannel, "read", CompositeChannel.read)
    for device in EAGER_S:
        wait_with_pauses(device)
        assert CompositeChannel.read.__wrapped__ is plain
