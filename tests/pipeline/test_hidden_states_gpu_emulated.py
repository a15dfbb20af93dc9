"""Memory that stages share on a GPU, its rooms, slots, stamps and tickets, with CUDA's part emulated in one process."""

from __future__ import annotations

import importlib
import sys
import types
from itertools import count

import pytest
import torch
from emulated_triton import emulated_kernels

from finlora.errors import ResourceError

CPU, HIDDEN, STAGES = torch.device("cpu"), 48, 3


class Gate:
    """Stands for finlora.pipeline.gpu_memory.Gate; what would wait for ever fails at once."""

    def __init__(self, _device):
        self.is_stopped = False

    def wait(self, flag, number):
        if self.is_stopped:
            raise RuntimeError("the stages were told to stop")
        assert int(flag) >= number, f"waits for {number} for ever: {int(flag)} was written"

    def stop(self):
        self.is_stopped = True

    def reopen(self):
        self.is_stopped = False


@pytest.fixture
def gpu(monkeypatch):
    """Modules `handover` and `board`, and the memories by handle."""
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
    with emulated_kernels():
        modules = [
            importlib.import_module(f"finlora.pipeline.{name}") for name in ("hidden_states_gpu", "sampled_tokens_gpu")
        ]
        yield types.SimpleNamespace(handover=modules[0], board=modules[1], memories=memories)
    for module in modules:
        del sys.modules[module.__name__]


def make_states(number, num_rows):
    return torch.randn(num_rows, HIDDEN, generator=torch.Generator().manual_seed(number)).bfloat16()


def test_states_and_stamps_of_each_place_arrive_also_in_rooms_that_have_grown(gpu):
    sender = gpu.handover.Sender(1, STAGES, HIDDEN, torch.bfloat16, CPU)
    receiver = gpu.handover.Receiver(STAGES, HIDDEN, torch.bfloat16, CPU)
    before = gpu.handover.Stamps(torch.tensor([1_000, 3_001_000, 0, 0, 0, 0]))
    sent = [(0, 3), (1, 500), (0, 1), (0, 30_000), (2, 21_845), (1, 2), (0, 900)]
    for ticket, (place, num_rows) in enumerate(sent, start=1):
        sender.begin(place, num_rows, before)
        parcel = sender.send(place, ticket, make_states(ticket, num_rows))
        hidden, stamps = receiver.receive(parcel)
        receiver.wait(parcel, ticket)
        stamps.begin(2)
        stamps.end(2)
        first, own, last = stamps.copy(0, 2)()
        assert torch.equal(hidden, make_states(ticket, num_rows))
        assert first == pytest.approx(3e-3)
        assert own > 0
        assert last >= 0
    # The room of place 0 was outgrown; it stays, since the next stage may have it mapped.
    assert len(gpu.memories) == 4
    assert sender.held_gib == sum(map(len, gpu.memories.values())) / 2**30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_trial_tells_what_arrives(gpu, monkeypatch, dtype):
    event = types.SimpleNamespace(record=lambda: None, query=lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    sender = gpu.handover.Sender(0, 2, 600, dtype, CPU)
    receiver = gpu.handover.Receiver(2, 600, dtype, CPU)
    parcel = sender.send_trial(5)
    receiver.take_trial(parcel, 5)
    gpu.memories[parcel.memory][-1000:] = 0  # behind the states
    receiver.take_trial(parcel, 5)
    gpu.memories[parcel.memory][256:300] = 1
    with pytest.raises(RuntimeError, match="what arrived was not what had been sent"):
        receiver.take_trial(parcel, 5)
    event.query = lambda: False
    monkeypatch.setattr(gpu.handover, "_TRIAL_S", 0.01)
    with pytest.raises(RuntimeError, match="nothing arrived within 0 s"):
        receiver.take_trial(parcel, 5)
    with pytest.raises(RuntimeError, match="told to stop"):
        receiver.wait(parcel, 5)
    receiver.close()
    receiver._gate.wait(torch.tensor([5]), 5)  # it waits again


def test_tokens_of_many_micro_batches_come_back_each_in_its_slot(gpu):
    last = gpu.board.LastBoard(CPU)
    first = gpu.board.FirstBoard(last.handle, CPU)
    for ticket in range(70):
        last.write(ticket, torch.arange(ticket % 5) + 100 * ticket)
        for kept in range(max(0, ticket - 31), ticket + 1):
            assert first.wait(kept)[: kept % 5].tolist() == [100 * kept + number for number in range(kept % 5)]
    most = gpu.board._WIDTH
    for ticket in (70, 31 + 64):  # the last slot ends before the mark
        last.write(ticket, torch.full((most,), 7))
        assert first.wait(ticket).tolist() == [7] * most
    assert gpu.board.FirstBoard(last.handle, CPU).wait(95)[0] == 7
    with pytest.raises(ResourceError, match="8,192 requests have a next token in one micro-batch, 8,191 is the most"):
        last.write(96, torch.zeros(most + 1, dtype=torch.long))
    gpu.memories[last.handle][-8:] = 0
    with pytest.raises(RuntimeError, match="what was read was not what had been written"):
        gpu.board.FirstBoard(last.handle, CPU)
