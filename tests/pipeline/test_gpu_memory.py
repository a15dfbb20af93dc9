"""GPU memory shared by two processes: hidden states and tokens announced ahead of time arrive, and a crash ends all waits."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import time

import pytest
import torch
from engine_requests import ON_GPU

from finlora.engine.messages import Message
from finlora.engine.micro_batch import MicroBatch
from finlora.errors import ResourceError

HIDDEN, BUSY_S = 64, 0.02
SENT = [(0, 3), (1, 500), (0, 1), (0, 900), (1, 2), (0, 900)]
"""(send buffer, rows): buffers that are reused, that must grow, and that are larger than their content."""


def make_states(number, num_rows):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(num_rows, HIDDEN, generator=generator).bfloat16()


def make_info(number, num_stages):
    from finlora.pipeline.links import StageInfo

    return StageInfo(number, num_stages, HIDDEN, torch.bfloat16, torch.device("cuda"), "127.0.0.1")


def make_message(ticket, buffer=0, num_rows=1):
    return Message(MicroBatch(0, [0] * num_rows), buffer=buffer, ticket=ticket)


def start_sender(send):
    """Return a process that runs `send` with a pipe, and this end of the pipe."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=send, args=(there,))
    process.start()
    there.close()
    return process, here


def send_all(pipe):
    """Stage 1 of 3: it computes for BUSY_S and sends its messages before it has finished."""
    from finlora.pipeline.hidden_states_gpu import GpuLink, GpuStamps

    device = torch.device("cuda")
    sender = GpuLink(make_info(1, 3))
    pipe.send(sender.offer(1))
    pipe.recv()
    for ticket, (buffer, num_rows) in enumerate(SENT, start=2):
        states = make_states(ticket, num_rows).to(device)
        # Stage 0 took 3 ms.
        before = GpuStamps(torch.tensor([1_000, 3_001_000, 0, 0, 0, 0], device=device))
        message = make_message(ticket, buffer, num_rows)
        torch.cuda.synchronize()
        started = time.perf_counter()
        sender.reserve(message, before).begin(1)
        torch.cuda._sleep(int(BUSY_S * 2.0e9))  # in cycles; the clock has at most 2 GHz
        message = dataclasses.replace(message, state=sender.send(message, states))
        pipe.send((message, time.perf_counter() - started))
        pipe.recv()
    pipe.close()
    os._exit(0)  # mapped memory stays until the other process closes it


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_states_arrive_after_their_message(_gpu):
    from finlora.pipeline.hidden_states_gpu import GpuLink, GpuStamps

    other, here = start_sender(send_all)
    receiver = GpuLink(make_info(2, 3))
    receiver.join(here.recv(), 1, 2)
    here.send(None)
    # Load the kernels before they are timed.
    make_states(0, 1).cuda() * 2
    first = GpuStamps(torch.zeros(6, dtype=torch.int64, device="cuda"))
    first.begin(2)
    first.end(2)
    queued = []
    for ticket, (_, num_rows) in enumerate(SENT, start=2):
        message, seconds = here.recv()
        queued.append(seconds)
        hidden, stamps = receiver.receive(message)
        receiver.wait(message)
        stamps.begin(2)
        doubled = hidden * 2
        stamps.end(2)
        before, own, mine = stamps.copy(0, 2)()
        assert torch.equal(doubled.cpu(), make_states(ticket, num_rows) * 2)
        assert before == pytest.approx(3e-3)
        assert own > 0.8 * BUSY_S
        assert 0 <= mine < BUSY_S  # the wait for the previous stage does not count
        here.send(None)
    other.join(30)
    assert other.exitcode == 0
    assert min(queued) < BUSY_S / 2
    receiver.close()


def send_trials(pipe):
    """Stages 0 and 1 of 2: send a trial, unexpected states, and token memory without its mark."""
    from finlora.pipeline.gpu_memory import LEAST_BYTES, allocate
    from finlora.pipeline.hidden_states_gpu import GpuLink

    device = torch.device("cuda")
    sender, message = GpuLink(make_info(0, 2)), make_message(3)
    pipe.send(sender.offer(2))
    pipe.recv()
    sender.reserve(message, None)
    pipe.send(dataclasses.replace(message, state=sender.send(message, make_states(0, 1).to(device))))
    pipe.recv()
    pipe.send(allocate(LEAST_BYTES, device).handle)
    pipe.recv()
    os._exit(0)


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_trial_detects_states_that_do_not_arrive(_gpu, monkeypatch):
    """Behind some PCIe bridges, a GPU does not read what another one wrote."""
    from finlora.pipeline import hidden_states_gpu
    from finlora.pipeline.sampled_tokens_gpu import GpuTokenLink

    monkeypatch.setattr(hidden_states_gpu, "_TRIAL_S", 1.0)
    other, here = start_sender(send_trials)
    receiver, tokens = hidden_states_gpu.GpuLink(make_info(1, 2)), GpuTokenLink(make_info(0, 2))
    receiver.join(here.recv(), 1, 2)
    here.send(None)
    message = here.recv()
    with pytest.raises(RuntimeError, match="the hidden states that arrived differ from those that were sent"):
        receiver.join(message, 1, 2)
    with pytest.raises(RuntimeError, match="no hidden states arrived within 1 s"):
        receiver.join(dataclasses.replace(message, ticket=4), 1, 2)
    here.send(None)
    with pytest.raises(RuntimeError, match="the memory does not hold what the last stage wrote"):
        tokens.join(here.recv())
    receiver.close()
    tokens.close()
    here.send(None)
    other.join(30)
    assert other.exitcode == 0


def send_and_crash(pipe):
    """Stage 0 of 2, killed while it computes the states of its second message."""
    from finlora.pipeline.hidden_states_gpu import GpuLink

    sender, states = GpuLink(make_info(0, 2)), make_states(0, 1).cuda()
    pipe.send(sender.offer(7))
    pipe.recv()
    for ticket, cycles in ((8, 1e6), (9, 1e11)):
        message = make_message(ticket)
        sender.reserve(message, None)
        torch.cuda._sleep(int(cycles))
        pipe.send(dataclasses.replace(message, state=sender.send(message, states)))
        pipe.recv()
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_stop_ends_the_wait_for_states_of_a_crashed_stage(_gpu):
    from finlora.pipeline.hidden_states_gpu import GpuLink

    other, here = start_sender(send_and_crash)
    receiver = GpuLink(make_info(1, 2))
    receiver.join(here.recv(), 1, 2)
    here.send(None)

    def queue(message):
        _, stamps = receiver.receive(message)
        receiver.wait(message)
        stamps.begin(1)
        return stamps.end(1)

    queue(here.recv())
    torch.cuda.synchronize()
    here.send(None)
    message = here.recv()
    queue(message)
    done = torch.cuda.Event()
    done.record()
    here.send(None)
    other.join(30)
    assert other.exitcode == -9
    time.sleep(0.5)
    assert not done.query()
    receiver.stop()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="the stages were stopped: the data that this one waits for will not arrive"):
        receiver.wait(dataclasses.replace(message, ticket=10))
    receiver.close()
    assert (torch.ones(2, device="cuda") * 2).tolist() == [2, 2]  # the GPU still works in this process


def send_tokens(pipe):
    """Last stage, with slow micro-batches."""
    from finlora.pipeline.sampled_tokens_gpu import GpuTokenLink

    device = torch.device("cuda")
    last = GpuTokenLink(make_info(1, 2))
    pipe.send(last.offer())
    tokens = torch.arange(40, device=device)
    pipe.recv()
    for ticket in range(1, 31):
        torch.cuda._sleep(int(2e6))
        last.send_sampled(ticket, tokens * ticket)
    pipe.recv()
    with pytest.raises(
        ResourceError, match=r"99,999 requests have a next token in one micro-batch, \d,\d+ is the most"
    ):
        last.send_sampled(31, torch.zeros(99_999, dtype=torch.int64, device=device))
    os._exit(0)


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_sampled_tokens_reach_the_first_stage_before_the_host_reads_them(_gpu):
    from finlora.pipeline.sampled_tokens_gpu import GpuTokenLink
    from finlora.stage.upload import fill_sampled

    other, here = start_sender(send_tokens)
    first = GpuTokenLink(make_info(0, 2))
    first.join(here.recv())
    here.send(None)
    found = []
    for ticket in range(1, 31):
        ids = torch.tensor([-1, 7, -40, -5], device="cuda")
        fill_sampled(ids, first.receive(ticket))
        found.append(ids)
    assert torch.stack(found).tolist() == [[0, 7, 39 * ticket, 4 * ticket] for ticket in range(1, 31)]
    here.send(None)
    other.join(30)
    assert other.exitcode == 0
    fill_sampled(ids, first.receive(31))
    done = torch.cuda.Event()
    done.record()
    time.sleep(0.2)
    assert not done.query()
    first.stop()
    torch.cuda.synchronize()
    first.close()
