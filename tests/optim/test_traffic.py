"""Counted traffic: rounds, bytes and seconds, for any engine that sends as DeepSpeed does."""

from __future__ import annotations

import time

import pytest
import torch

from finlora.optim.traffic import Wire, WireClock, WireMeter

CPU = torch.device("cpu")


class Engine:
    """Sends as a DeepSpeedEngine at ZeRO stage 0 does: one call below allreduce_gradients."""

    def __init__(self) -> None:
        self.num_calls = 0

    def buffered_allreduce_fallback(self, grads=None, elements_per_buffer=500):
        self.num_calls += 1
        time.sleep(0.01)

    def step(self):
        self.buffered_allreduce_fallback(grads=None, elements_per_buffer=7)


class Counting(torch.optim.SGD):
    """Optimiser that communicates itself, like ZeroOneAdam."""

    num_syncs, bytes_sent, bytes_adam = 3, 100, 400


def optimizer(cls=torch.optim.SGD):
    return cls([torch.nn.Parameter(torch.ones(2))], lr=0.1)


def test_gradient_all_reduce_counts_as_a_ring_of_float32():
    """2 (n - 1) / n * 4 N bytes a round: N = 100 elements, n = 4 ranks."""
    meter, engine = WireMeter(WireClock(CPU), 100, 4), Engine()
    meter.watch(engine)
    for _ in range(3):
        engine.step()
    wire = meter.read(optimizer())
    assert engine.num_calls == 3
    assert (wire.rounds, wire.bytes_sent, wire.bytes_adam) == (3, 3 * 600, 3 * 600)
    assert 0.03 <= wire.seconds < 1


def test_one_worker_sends_nothing():
    meter, engine = WireMeter(WireClock(CPU), 100, 1), Engine()
    meter.watch(engine)
    engine.step()
    assert engine.num_calls == 1
    assert meter.read(optimizer()) == Wire()


def test_optimiser_that_communicates_itself_counts_itself():
    meter = WireMeter(WireClock(CPU), 100, 4)
    with meter.clock.running():
        time.sleep(0.01)
    wire = meter.read(optimizer(Counting))
    assert (wire.rounds, wire.bytes_sent, wire.bytes_adam) == (3, 100, 400)
    assert wire.seconds >= 0.01


def test_counts_go_on_after_a_resume():
    meter, engine = WireMeter(WireClock(CPU), 100, 2), Engine()
    meter.watch(engine)
    meter.resume(Wire(rounds=5, bytes_sent=2000, bytes_adam=2000, seconds=8.0))
    engine.step()
    wire = meter.read(optimizer())
    assert (wire.rounds, wire.bytes_sent, wire.bytes_adam) == (6, 6 * 400, 6 * 400)
    assert 8.01 <= wire.seconds < 9


def test_seconds_on_a_gpu_are_read_from_pairs_of_events_once(monkeypatch):
    class Event:
        """Replacement of torch.cuda.Event on a simulated clock in milliseconds."""

        now = 0.0

        def __init__(self, enable_timing):
            self.at = self.is_awaited = None

        def record(self):
            self.at = Event.now

        def synchronize(self):
            self.is_awaited = True

        def elapsed_time(self, end):
            assert end.is_awaited
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = WireClock(torch.device("cuda"))
    for milliseconds in (20.0, 30.0):
        with clock.running():
            Event.now += milliseconds
        Event.now += 500.0
    assert clock.read_seconds() == clock.read_seconds() == pytest.approx(0.05)
    with clock.running():
        Event.now += 10.0
    assert clock.read_seconds() == pytest.approx(0.06)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_seconds_on_a_gpu_are_the_devices_not_the_hosts():
    """Work is queued quickly but takes the device much longer; the full time is counted when it is read."""
    device = torch.device("cuda")
    clock, values = WireClock(device), torch.ones(8192, 8192, device=device)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        with clock.running():
            values = values @ values / 8192
    queued = time.perf_counter() - started
    seconds = clock.read_seconds()
    assert seconds > queued
    assert seconds <= time.perf_counter() - started
    assert clock.read_seconds() == seconds
