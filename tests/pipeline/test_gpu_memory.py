"""What processes leave for each other on a GPU arrives whole, though told of before, and nobody waits for the dead."""

from __future__ import annotations

import multiprocessing
import os
import time

import pytest
import torch
from engine_requests import ON_GPU

from finlora.errors import ResourceError

HIDDEN, BUSY_S = 64, 0.02
SENT = [(0, 3), (1, 500), (0, 1), (0, 900), (1, 2), (0, 900)]
"""(place, rows): rooms that are used again, outgrown, and larger than what they hold."""


def make_states(number, num_rows):
    generator = torch.Generator().manual_seed(number)
    return torch.randn(num_rows, HIDDEN, generator=generator).bfloat16()


def start_sender(send):
    """Return a process that runs `send` with a pipe, and the pipe's end here."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=send, args=(there,))
    process.start()
    there.close()
    return process, here


def send_all(pipe):
    """Stage 1 of 3; it computes for a while, and its parcels are on their way before that is over."""
    from finlora.pipeline.hidden_states_gpu import Sender, Stamps

    device = torch.device("cuda")
    sender = Sender(1, 3, HIDDEN, torch.bfloat16, device)
    for number, (place, num_rows) in enumerate(SENT):
        states = make_states(number, num_rows).to(device)
        # Stage 0 took 3 ms.
        before = Stamps(torch.tensor([1_000, 3_001_000, 0, 0, 0, 0], device=device))
        torch.cuda.synchronize()
        started = time.perf_counter()
        sender.begin(place, num_rows, before)
        torch.cuda._sleep(int(BUSY_S * 2.0e9))  # cycles of a clock of 2 GHz at most
        parcel = sender.send(place, number, states)
        pipe.send((parcel, time.perf_counter() - started))
        pipe.recv()
    pipe.close()
    os._exit(0)  # what the other has mapped stays until it closes it


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_states_arrive_though_the_parcel_comes_before_them(_gpu):
    from finlora.pipeline.hidden_states_gpu import Receiver, Stamps

    other, here = start_sender(send_all)
    receiver = Receiver(3, HIDDEN, torch.bfloat16, torch.device("cuda"))
    # Kernels are loaded before their time is taken.
    make_states(0, 1).cuda() * 2
    first = Stamps(torch.zeros(6, dtype=torch.int64, device="cuda"))
    first.begin(2)
    first.end(2)
    queued = []
    for number, (_, num_rows) in enumerate(SENT):
        parcel, seconds = here.recv()
        queued.append(seconds)
        hidden, stamps = receiver.receive(parcel)
        receiver.wait(parcel, number)
        stamps.begin(2)
        doubled = hidden * 2
        stamps.end(2)
        before, own, mine = stamps.copy(0, 2)()
        assert torch.equal(doubled.cpu(), make_states(number, num_rows) * 2)
        assert before == pytest.approx(3e-3)
        assert own > 0.8 * BUSY_S
        assert 0 <= mine < BUSY_S  # the wait for the stage before does not count
        here.send(None)
    other.join(30)
    assert other.exitcode == 0
    assert min(queued) < BUSY_S / 2
    receiver.close()


def send_trials(pipe):
    """Stage 0 of 2, and the last one: a trial, states that nobody knows, and a board without its mark."""
    from finlora.pipeline.gpu_memory import LEAST_BYTES, allocate
    from finlora.pipeline.hidden_states_gpu import Sender

    device = torch.device("cuda")
    sender = Sender(0, 2, HIDDEN, torch.bfloat16, device)
    pipe.send(sender.send_trial(2))
    pipe.recv()
    sender.begin(0, 1, None)
    pipe.send(sender.send(0, 3, make_states(0, 1).to(device)))
    pipe.recv()
    pipe.send(allocate(LEAST_BYTES, device).handle)
    pipe.recv()
    os._exit(0)


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_a_trial_tells_whether_states_arrive(_gpu, monkeypatch):
    """Behind some bridges a GPU reads something else than another one wrote."""
    from finlora.pipeline import hidden_states_gpu
    from finlora.pipeline.sampled_tokens_gpu import FirstBoard

    monkeypatch.setattr(hidden_states_gpu, "_TRIAL_S", 1.0)
    other, here = start_sender(send_trials)
    device = torch.device("cuda")
    receiver = hidden_states_gpu.Receiver(2, HIDDEN, torch.bfloat16, device)
    receiver.take_trial(here.recv(), 2)
    here.send(None)
    parcel = here.recv()
    with pytest.raises(RuntimeError, match="what arrived was not what had been sent"):
        receiver.take_trial(parcel, 3)
    with pytest.raises(RuntimeError, match="nothing arrived within 1 s"):
        receiver.take_trial(parcel, 4)
    here.send(None)
    with pytest.raises(RuntimeError, match="what was read was not what had been written"):
        FirstBoard(here.recv(), device)
    receiver.close()
    here.send(None)
    other.join(30)
    assert other.exitcode == 0


def send_and_die(pipe):
    """Stage 0 of 2, killed while it computes what its second parcel is for."""
    from finlora.pipeline.hidden_states_gpu import Sender

    sender, states = Sender(0, 2, HIDDEN, torch.bfloat16, torch.device("cuda")), make_states(0, 1).cuda()
    for ticket, cycles in ((8, 1e6), (9, 1e11)):
        sender.begin(0, 1, None)
        torch.cuda._sleep(int(cycles))
        pipe.send(sender.send(0, ticket, states))
        pipe.recv()
    os.kill(os.getpid(), 9)


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_states_of_a_stage_that_died_are_not_waited_for_once_that_is_told(_gpu):
    from finlora.pipeline.hidden_states_gpu import Receiver

    other, here = start_sender(send_and_die)
    receiver = Receiver(2, HIDDEN, torch.bfloat16, torch.device("cuda"))

    def queue(parcel, ticket):
        _, stamps = receiver.receive(parcel)
        receiver.wait(parcel, ticket)
        stamps.begin(1)
        return stamps.end(1)

    queue(here.recv(), 8)
    torch.cuda.synchronize()
    here.send(None)
    parcel = here.recv()
    queue(parcel, 9)
    done = torch.cuda.Event()
    done.record()
    here.send(None)
    other.join(30)
    assert other.exitcode == -9
    time.sleep(0.5)
    assert not done.query()
    receiver.stop()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="the stages were told to stop: what this one waits for will not come"):
        receiver.wait(parcel, 10)
    receiver.close()
    assert (torch.ones(2, device="cuda") * 2).tolist() == [2, 2]  # this process goes on


def write_boards(pipe):
    """The last stage; each micro-batch takes it a while."""
    from finlora.pipeline.sampled_tokens_gpu import LastBoard

    device = torch.device("cuda")
    board = LastBoard(device)
    pipe.send(board.handle)
    tokens = torch.arange(40, device=device)
    pipe.recv()
    for ticket in range(1, 31):
        torch.cuda._sleep(int(2e6))
        board.write(ticket, tokens * ticket)
    pipe.recv()
    with pytest.raises(
        ResourceError, match=r"99,999 requests have a next token in one micro-batch, \d,\d+ is the most"
    ):
        board.write(31, torch.zeros(99_999, dtype=torch.int64, device=device))
    os._exit(0)


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_drawn_tokens_come_back_by_a_board_before_the_host_has_seen_them(_gpu):
    from finlora.pipeline.sampled_tokens_gpu import FirstBoard
    from finlora.stage.upload import fill_sampled

    other, here = start_sender(write_boards)
    board = FirstBoard(here.recv(), torch.device("cuda"))
    here.send(None)
    found = []
    for ticket in range(1, 31):
        ids = torch.tensor([-1, 7, -40, -5], device="cuda")
        fill_sampled(ids, board.wait(ticket))
        found.append(ids)
    assert torch.stack(found).tolist() == [[0, 7, 39 * ticket, 4 * ticket] for ticket in range(1, 31)]
    here.send(None)
    other.join(30)
    assert other.exitcode == 0
    fill_sampled(ids, board.wait(31))
    done = torch.cuda.Event()
    done.record()
    time.sleep(0.2)
    assert not done.query()
    board.stop()
    torch.cuda.synchronize()
    board.close()
