"""Sampled tokens on a TCP connection from the last stage to the first; all waits end after a crash."""

from __future__ import annotations

import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from finlora.engine.micro_batch import Output
from finlora.errors import ResourceError
from finlora.pipeline import sampled_tokens
from finlora.pipeline.links import StageInfo
from finlora.pipeline.sampled_tokens import SocketTokenLink


def make_link(number):
    return SocketTokenLink(StageInfo(number, 2, 0, torch.float32, torch.device("cpu"), "127.0.0.1"))


def make_output(tokens):
    return Output(0, [(token, 0.0) for token in tokens], ())


def join(first, last):
    """Join both ends concurrently, as stages do."""
    address = first.offer()
    assert last.offer() is None
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(first.join, None)
        last.join(address)
        accepted.result(10)


@pytest.fixture
def ends():
    first, last = make_link(0), make_link(1)
    join(first, last)
    yield first, last
    first.close()
    last.close()


def send_later(last, ticket, tokens, after_s=0.1):
    timer = threading.Timer(after_s, last.send_read, (ticket, make_output(tokens)))
    timer.start()
    return timer


def test_tokens_arrive_when_they_are_sampled(ends):
    first, last = ends
    for ticket, tokens in enumerate(([5, 2**40, 0], list(range(5000)))):
        timer = send_later(last, ticket, tokens)
        assert first.receive(ticket).tolist() == tokens
        assert first.receive(ticket).tolist() == tokens  # two micro-batches may follow one
        timer.join()


def test_last_stage_never_blocks_if_the_first_only_drains(ends):
    first, last = ends
    for ticket in range(20_000):
        last.send_read(ticket, make_output([ticket] * 16))
        if ticket % 3 == 0:
            first.drain()
    assert first.receive(19_999).tolist() == [19_999] * 16
    assert len(first._arrived.tokens) == sampled_tokens._KEPT


def test_wait_for_a_failed_micro_batch_ends(ends):
    first, last = ends
    last.send_read(3, None)
    with pytest.raises(
        RuntimeError, match="a micro-batch has failed: the tokens that the next one follows will not arrive"
    ):
        first.receive(3)


@pytest.mark.parametrize("why", ["crash", "stop"])
def test_waits_end_after_a_crash_and_after_stop(ends, why):
    first, last = ends
    timer = threading.Timer(0.1, last.close if why == "crash" else first.stop)
    timer.start()
    with pytest.raises(RuntimeError, match="the last stage has crashed, or this one was stopped"):
        first.receive(0)
    timer.join()
    last.send_read(1, make_output([4]))  # no error, even without the first stage


def test_connection_without_the_key_is_closed():
    first, last = make_link(0), make_link(1)
    address = first.offer()
    with ThreadPoolExecutor(1) as pool, socket.create_connection(address[:2]) as stranger:
        stranger.sendall(b"x" * 32)
        accepted = pool.submit(first.join, None)
        assert stranger.recv(1) == b""
        last.join(address)
        accepted.result(10)
    last.send_read(0, make_output([9]))
    assert first.receive(0).tolist() == [9]
    first.close()
    last.close()


def test_closed_link_can_join_again(ends):
    first, last = ends
    last.send_read(0, make_output([9]))
    assert first.receive(0).tolist() == [9]
    first.stop()
    first.close()
    last.close()
    join(first, last)
    last.send_read(1, make_output([]))  # sends no frame
    last.send_read(2, make_output([4, 5]))
    assert first.receive(2).tolist() == [4, 5]
    assert list(first._arrived.tokens) == [2]


def test_stages_that_cannot_connect_say_what_to_do(monkeypatch):
    monkeypatch.setattr(sampled_tokens, "_JOIN_S", 0.1)
    first, last = make_link(0), make_link(1)
    address = first.offer()
    with pytest.raises(
        ResourceError, match=r"did not reach the first at 127.0.0.1:\d+ in 0 s: let the cluster's machines"
    ):
        first.join(None)
    with pytest.raises(ResourceError, match=r"first stage cannot be reached at 127.0.0.1:\d+ \(.*refused"):
        last.join(address)
    first.close()
