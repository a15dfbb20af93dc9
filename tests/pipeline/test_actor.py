"""Stage actors that pass messages in one process, with a fake link in place of shared GPU memory."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

from finlora.engine.messages import Message, Parcel
from finlora.engine.micro_batch import MicroBatch, Output, Sample
from finlora.errors import ResourceError
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.pipeline.actor import StageActor
from finlora.pipeline.links import StageInfo
from finlora.pipeline.sampled_tokens import LocalTokenLink
from finlora.stage.stage import Stage

CPU, ROWS = torch.device("cpu"), 64
SPANS = [(0, 2), (2, 3), (3, 4)]
INFO = StageInfo(0, 1, 0, torch.float32, CPU, "127.0.0.1")


class PretendStamps:
    """Start and end of each stage, on a simulated clock."""

    def __init__(self, times=()):
        self.times = dict(times)

    def begin(self, stage):
        self.times[stage] = [float(len(self.times))]

    def end(self, stage):
        self.times[stage].append(self.times[stage][0] + 1.0 + stage)

    def copy(self, first, last):
        seconds = tuple(self.times[stage][1] - self.times[stage][0] for stage in range(first, last + 1))
        return lambda: seconds


class PretendGpu:
    """Fake GpuLink of two stages: the memory that they share, by send buffer."""

    runs_ahead, held_gib = True, 0.0

    def __init__(self, stage):
        self.stage, self.buffers = stage, {}

    def reserve(self, message, stamps):
        own = PretendStamps(stamps.times if stamps else ())
        self.buffers[message.buffer] = (message.work.num_rows, own)
        return own

    def send(self, message, hidden):
        num_rows, stamps = self.buffers[message.buffer]
        assert len(hidden) == num_rows
        stamps.end(self.stage)
        self.buffers[message.buffer] = (hidden.clone(), stamps)
        self.ticket = message.ticket
        return Parcel(bytes([message.buffer]), 0, num_rows)

    def receive(self, message):
        hidden, stamps = self.buffers[message.state.memory[0]]
        self.received = torch.full_like(hidden, float("nan"))  # until `wait`
        return self.received, stamps

    def wait(self, message):
        assert message.ticket <= self.ticket
        self.received.copy_(self.buffers[message.state.memory[0]][0])


def make_batch(number, ids, first_row):
    batch = MicroBatch(number, adapters=[(None, len(ids))])
    batch.add(ids, 0, range(first_row, first_row + len(ids)), [(first_row, len(ids))])
    batch.samples.append(Sample(len(ids) - 1, 0.0, 1.0, 0, 0))
    return batch


BATCHES = [make_batch(0, [5, 9, 2], 0), make_batch(1, [7, 3], 10), make_batch(2, [11, 4, 8, 6], 20)]
FOLLOWING = MicroBatch(3, adapters=[(None, 1)], follows=2)
"""Decode step of the last of BATCHES."""
FOLLOWING.add([-1], 4, [24], [(20, 5)])
FOLLOWING.samples.append(Sample(0, 0.0, 1.0, 0, 1))


@pytest.fixture(scope="module")
def expected(four_layers):
    with quiet_bitsandbytes():
        alone = InProcess([Stage(load_base(four_layers, 16, CPU, 0).model, range(4), ROWS, torch.float32)])
    tokens = []
    for batch in [*BATCHES, FOLLOWING]:
        alone.start(batch)
        if batch.number != FOLLOWING.follows:
            tokens += [alone.collect().tokens for _ in range(1 + (batch is FOLLOWING))]
    return tokens


def join_by_messages(actor, number):
    for rank, is_member in enumerate((number < len(SPANS) - 1, number > 0)):
        if is_member:
            assert not actor.join_hidden_states("messages", None, rank, 2)


@pytest.fixture
def actors(four_layers):
    def make(number, span):
        settings = {"device": "cpu", "cache_rows": ROWS, "keep_unpacked": False}
        actor = StageActor(dataclasses.asdict(four_layers), 16, span, 0, **settings)
        assert actor.take_number(number, len(SPANS)) is None
        join_by_messages(actor, number)
        return actor

    found = [make(number, span) for number, span in enumerate(SPANS)]
    yield found
    for actor in reversed(found):
        actor._quiet.__exit__(None, None, None)  # outside tests it ends with the stage's process


def share_memory(actors, *numbers):
    """Link each of these stages to the next one by shared memory."""
    for number in numbers:
        actors[number].outgoing = actors[number + 1].incoming = PretendGpu(number)


@pytest.mark.parametrize("sharing", [(), (0,), (1,), (0, 1)], ids=["none", "first two", "last two", "all"])
def test_micro_batches_keep_their_hidden_states_and_times(sharing, actors, expected):
    share_memory(actors, *sharing)
    messages = [
        Message(batch, buffer=buffer, ticket=batch.number + 5) for batch, buffer in zip(BATCHES, (0, 1, 0), strict=True)
    ]
    # Two micro-batches are in flight; the third uses the first one's send buffer and starts when that is free.
    waiting = [actors[0].run(message) for message in messages[:2]]
    waiting = [actors[1].run(message) for message in waiting]
    outputs = [actors[2].run(waiting[0])]
    third = actors[0].run(messages[2])
    outputs += [actors[2].run(waiting[1]), actors[2].run(actors[1].run(third))]
    for number, message in enumerate(outputs):
        assert isinstance(message.state, Output)
        assert message.state.number == number
        assert message.buffer == messages[number].buffer
        found = [token for token, _ in message.state.tokens]
        assert found == [token for token, _ in expected[number]]
        assert len(message.seconds) == 3
        if sharing == (0, 1):
            assert message.seconds == (1.0, 2.0, 3.0)  # from the stamps of each stage


def test_late_read_returns_each_answer_with_the_next_message(actors, expected):
    share_memory(actors, 0, 1)
    actors[2].read_late()
    broken = Message(BATCHES[2], ResourceError("the GPU is full"))

    def pass_through(message):
        for actor in actors:
            message = actor.run(message)
        return message

    assert pass_through(Message(BATCHES[0], ticket=5)).is_empty
    found = [pass_through(Message(BATCHES[1], ticket=6)), pass_through(Message(None))]
    for number, message in enumerate(found):
        assert message.seconds == (1.0, 2.0, 3.0)
        assert (message.work, message.state.number) == (None, number)
        assert [token for token, _ in message.state.tokens] == [token for token, _ in expected[number]]
    assert [pass_through(broken).is_empty, pass_through(Message(None))] == [True, broken]
    assert pass_through(Message(None)).is_empty
    assert pass_through(Message(BATCHES[0], ticket=7)).is_empty
    actors[2].reset()
    assert not actors[2].reader.is_late
    assert actors[2].reader.take(Message(None)).is_empty  # the unread answer was dropped


def test_message_carries_the_times_of_stages_that_share_memory(actors):
    share_memory(actors, 0)
    first = actors[0].run(Message(BATCHES[0]))
    assert isinstance(first.state, Parcel)
    assert first.seconds == ()
    assert actors[1].run(first).seconds == (1.0, 2.0)


def test_stage_joins_by_another_transport_after_a_reset(actors):
    share_memory(actors, 0)
    for number in (0, 1):
        actors[number].reset()
        assert actors[number].incoming is actors[number].outgoing is None
        join_by_messages(actors[number], number)
    message = actors[0].run(Message(BATCHES[0]))
    assert not isinstance(message.state, Parcel)
    assert len(message.seconds) == 1
    assert isinstance(actors[2].run(actors[1].run(message)).state, Output)


class LoggedLink(LocalTokenLink):
    """Both ends of a token link, with a log of what was sent and received."""

    def __init__(self):
        super().__init__(INFO)
        self.log = []

    def receive(self, ticket):
        self.log.append(("receive", ticket))
        return super().receive(ticket)

    def send_read(self, ticket, output):
        self.log.append(("send", ticket, None if output is None else [token for token, _ in output.tokens]))
        super().send_read(ticket, output)


def test_first_stage_starts_from_the_last_stages_sampled_tokens(actors, expected):
    link = actors[0].sampled_in = actors[2].sampled_out = LoggedLink()
    answers = []
    for message in (Message(BATCHES[2], ticket=7), Message(FOLLOWING, ticket=8, follows=7)):
        for actor in actors:
            message = actor.run(message)
        answers.append([token for token, _ in message.state.tokens])
    assert answers[1] == [token for token, _ in expected[3]]
    assert link.log == [("send", 7, answers[0]), ("receive", 7), ("send", 8, answers[1])]


def test_wait_for_tokens_does_not_count_as_compute_time(actors):
    class Slow(LocalTokenLink):
        def receive(self, ticket):
            time.sleep(0.5)
            return super().receive(ticket)

    actors[0].sampled_in = Slow(INFO)
    actors[0].sampled_in.send_read(7, Output(2, [(5, 0.0)], ()))
    started = time.perf_counter()
    assert actors[0].run(Message(FOLLOWING, ticket=8, follows=7)).seconds[0] < time.perf_counter() - started - 0.5


def test_failure_before_the_last_stage_is_sent_to_the_first(actors):
    link = actors[0].sampled_in = actors[2].sampled_out = LoggedLink()
    broken = Message(BATCHES[2], ResourceError("the GPU is full"), ticket=7)
    assert actors[2].run(broken) == broken
    with pytest.raises(
        RuntimeError, match="a micro-batch has failed: the tokens that the next one follows will not arrive"
    ):
        actors[0].run(Message(FOLLOWING, ticket=8, follows=7))
    assert link.log == [("send", 7, None), ("receive", 7)]


def test_single_stage_starts_from_its_own_sampled_tokens(four_layers, expected):
    actor = StageActor(
        dataclasses.asdict(four_layers), 16, (0, 4), 0, device="cpu", cache_rows=ROWS, keep_unpacked=False
    )
    actor.take_number(0, 1)
    assert not actor.join_tokens("local", actor.offer_tokens("local"))
    messages = Message(BATCHES[2], ticket=7), Message(FOLLOWING, ticket=8, follows=7)
    answers = [actor.run(message).state.tokens for message in messages]
    actor._quiet.__exit__(None, None, None)
    assert [[token for token, _ in tokens] for tokens in answers] == [
        [token for token, _ in expected[n]] for n in (2, 3)
    ]
