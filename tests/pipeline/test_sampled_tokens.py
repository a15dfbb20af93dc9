"""Drawn tokens go back by a connection of their own, and nobody waits for those that will not come."""

from __future__ import annotations

import socket
import threading

import pytest

from finlora.errors import ResourceError
from finlora.pipeline import sampled_tokens
from finlora.pipeline.sampled_tokens import FirstEnd, LastEnd


@pytest.fixture
def ends():
    first = FirstEnd("127.0.0.1")
    last = LastEnd(first.address)
    first.accept()
    yield first, last
    first.close()
    last.close()


def send_later(last, ticket, tokens, after_s=0.1):
    timer = threading.Timer(after_s, last.send, (ticket, tokens))
    timer.start()
    return timer


def test_tokens_come_when_they_are_drawn(ends):
    first, last = ends
    for ticket, tokens in enumerate(([5, 2**40, 0], list(range(5000)), [])):
        timer = send_later(last, ticket, tokens)
        assert first.wait(ticket) == tokens
        assert first.wait(ticket) == tokens  # two micro-batches may follow one
        timer.join()


def test_last_stage_never_waits_for_a_first_one_that_follows_nothing(ends):
    first, last = ends
    for ticket in range(20_000):
        last.send(ticket, [ticket] * 16)
        if ticket % 3 == 0:
            first.drain()
    assert first.wait(19_999) == [19_999] * 16
    assert len(first._came.tokens) == sampled_tokens._KEPT


def test_failed_micro_batch_is_not_waited_for(ends):
    first, last = ends
    last.send(3, None)
    with pytest.raises(
        RuntimeError, match="a micro-batch has failed: the tokens that the next one follows will not come"
    ):
        first.wait(3)


@pytest.mark.parametrize("why", ["the last stage dies", "the first is told to stop"])
def test_nobody_waits_for_tokens_that_will_not_come(ends, why):
    first, last = ends
    timer = threading.Timer(0.1, last.close if why == "the last stage dies" else first.stop)
    timer.start()
    with pytest.raises(RuntimeError, match="the last stage is not there, or was told to stop"):
        first.wait(0)
    timer.join()
    last.send(1, [4])  # nor does it mind that the first is gone


def test_stranger_is_sent_away():
    first = FirstEnd("127.0.0.1")
    with socket.create_connection(first.address[:2]) as stranger:
        stranger.sendall(b"x" * 32)
        thread = threading.Thread(target=first.accept)
        thread.start()
        assert stranger.recv(1) == b""
        last = LastEnd(first.address)
        thread.join(10)
    last.send(0, [9])
    assert first.wait(0) == [9]
    first.close()
    last.close()


def test_stages_that_do_not_meet_say_what_to_do(monkeypatch):
    monkeypatch.setattr(sampled_tokens, "_JOIN_S", 0.1)
    first = FirstEnd("127.0.0.1")
    with pytest.raises(
        ResourceError, match=r"did not reach the first at 127.0.0.1:\d+ in 0 s: let the cluster's machines"
    ):
        first.accept()
    with pytest.raises(ResourceError, match=r"first stage cannot be reached at 127.0.0.1:\d+ \(.*refused"):
        LastEnd(first.address)
    first.close()
