"""GPU links of hidden states and sampled tokens: buffers, slots, stamps and tickets, with CUDA emulated in one process."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from itertools import count

import pytest
import torch
from emulated_triton import emulated_kernels

from finlora.engine.messages import Message
from finlora.engine.micro_batch import MicroBatch
from finlora.errors import ResourceError
from finlora.pipeline.links import StageInfo

CPU, HIDDEN, STAGES = torch.device("cpu"), 48, 3


class Gate:
    """Fake of finlora.pipeline.gpu_memory.Gate: a wait that would never end fails at once."""

    def __init__(self, _device):
        self.is_stopped = False

    def wait(self, flag, number):
        if self.is_stopped:
            raise RuntimeError("the stages were stopped")
        assert int(flag) >= number, f"a wait for {number} would never end: {int(flag)} was written"

    def stop(self):
        self.is_stopped = True

    def reopen(self):
        self.is_stopped = False


@pytest.fixture
def gpu(monkeypatch):
    """Modules of both links, and the allocated memory by handle."""
    memories, numbers = {}, count()
    fake = types.ModuleType("finlora.pipeline.gpu_memory")

    def allocate(num_bytes, _device):
        handle = b"%d" % next(numbers)
        memories[handle] = torch.zeros(num_bytes, dtype=torch.uint8)
        return types.SimpleNamespace(data=memories[handle], handle=handle)

    def map_memory(handle, num_bytes, _device):
        assert len(memories[handle]) == num_bytes
        return types.SimpleNamespace(data=memories[handle])

    fake.LEAST_BYTES, fake.Owned, fake.Mapped, fake.Gate = 2**21, types.SimpleNamespace, types.SimpleNamespace, Gate
    fake.allocate, fake.map_memory, fake.unmap = allocate, map_memory, lambda _memory: None
    fake.write_flag = lambda flag, number: flag.fill_(number)
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: types.SimpleNamespace(synchronize=lambda: None))
    for name in ("hidden_states_gpu", "sampled_tokens_gpu"):
        monkeypatch.delitem(sys.modules, f"finlora.pipeline.{name}", raising=False)
    event = types.SimpleNamespace(record=lambda: None, query=lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    with emulated_kernels():
        modules = [
            importlib.import_module(f"finlora.pipeline.{name}") for name in ("hidden_states_gpu", "sampled_tokens_gpu")
        ]
        yield types.SimpleNamespace(states=modules[0], tokens=modules[1], memories=memories, event=event)
    for module in modules:
        del sys.modules[module.__name__]


def make_states(number, num_rows):
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(number)).bfloat16()


def make_info(number, num_stages, hidden_size=HIDDEN, dtype=torch.bfloat16):
    return StageInfo(number, num_stages, hidden_size, dtype, CPU, "127.0.0.1")


def test_states_and_stamps_arrive_from_each_buffer_also_after_it_grew(gpu):
    sender, receiver = gpu.states.GpuLink(make_info(1, STAGES)), gpu.states.GpuLink(make_info(2, STAGES))
    receiver.join(sender.offer(0), 1, 2)
    before = gpu.states.GpuStamps(torch.tensor([1_000, 3_001_000, 0, 0, 0, 0]))
    sent = [(0, 3), (1, 500), (0, 1), (0, 30_000), (2, 21_845), (1, 2), (0, 900)]
    for ticket, (buffer, num_rows) in enumerate(sent, start=1):
        message = Message(MicroBatch(0, [0] * num_rows), buffer=buffer, ticket=ticket)
        sender.reserve(message, before).begin(1)
        message = dataclasses.replace(message, state=sender.send(message, make_states(ticket, num_rows)))
        hidden, stamps = receiver.receive(message)
        receiver.wait(message)
        stamps.begin(2)
        stamps.end(2)
        first, own, last = stamps.copy(0, 2)()
        assert torch.equal(hidden, make_states(ticket, num_rows))
        assert first == pytest.approx(3e-3)
        assert own > 0
        assert last >= 0
    # Buffer 0 had to grow; its old memory stays, since the next stage may have it mapped.
    assert len(gpu.memories) == 4
    assert sender.held_gib == sum(map(len, gpu.memories.values())) / 2**30
    assert receiver.held_gib == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trial_detects_states_that_differ_or_do_not_arrive(gpu, monkeypatch, dtype):
    sender, receiver = (gpu.states.GpuLink(make_info(number, 2, 600, dtype)) for number in (0, 1))
    offer = sender.offer(5)
    sender.join(offer, 0, 2)
    receiver.join(offer, 1, 2)
    memory = gpu.memories[offer.state.memory]
    memory[-1000:] = 0  # after the states: not compared
    receiver.join(offer, 1, 2)
    memory[256:300] = 1
    with pytest.raises(RuntimeError, match="the hidden states that arrived differ from those that were sent"):
        receiver.join(offer, 1, 2)
    gpu.event.query = lambda: False
    monkeypatch.setattr(gpu.states, "_TRIAL_S", 0.01)
    with pytest.raises(RuntimeError, match="no hidden states arrived within 0 s"):
        receiver.join(offer, 1, 2)
    with pytest.raises(RuntimeError, match="the stages were stopped"):
        receiver.wait(offer)
    receiver.close()
    gpu.event.query = lambda: True
    receiver.join(sender.offer(6), 1, 2)  # the gate is open again


def test_tokens_of_many_micro_batches_are_read_from_their_slots(gpu):
    def join():
        first = gpu.tokens.GpuTokenLink(make_info(0, STAGES))
        assert first.offer() is None
        first.join(last.offer())
        return first

    last = gpu.tokens.GpuTokenLink(make_info(2, STAGES))
    first = join()
    last.join(None)
    for ticket in range(70):
        last.send_sampled(ticket, torch.arange(ticket % 5) + 100 * ticket)
        for kept in range(max(0, ticket - 31), ticket + 1):
            found = first.receive(kept)[: kept % 5].tolist()
            assert found == [100 * kept + number for number in range(kept % 5)]
    most = gpu.tokens._WIDTH
    for ticket in (70, 31 + 64):  # the last slot ends before the mark
        last.send_sampled(ticket, torch.full((most,), 7))
        assert first.receive(ticket).tolist() == [7] * most
    assert join().receive(95)[0] == 7
    assert (first.held_gib, last.held_gib) == (0, 2 / 1024)
    with pytest.raises(ResourceError, match="8,192 requests have a next token in one micro-batch, 8,191 is the most"):
        last.send_sampled(96, torch.zeros(most + 1, dtype=torch.long))
    first.stop()
    with pytest.raises(RuntimeError, match="the stages were stopped"):
        first.receive(95)
    first.close()
    first.join(last.offer())  # the last stage keeps its memory
    assert first.receive(95)[0] == 7
    (memory,) = gpu.memories.values()
    memory[-8:] = 0
    with pytest.raises(RuntimeError, match="the memory does not hold what the last stage wrote"):
        join()
