"""Stages in one process, joined by GPU links with CUDA and Ray calls emulated: the same answers as one stage."""

from __future__ import annotations

import types

import pytest
from test_actor import BATCHES, FOLLOWING, actors, expected  # noqa: F401  (fixtures)
from test_hidden_states_gpu_emulated import gpu  # noqa: F401  (a fixture)

from finlora.engine.messages import Message
from finlora.pipeline import graph


class Ref:
    """Result of an actor's call, or the error that it raised."""

    def __init__(self, call, arguments):
        try:
            self.value, self.error = call(*(get(each) if isinstance(each, Ref) else each for each in arguments)), None
        except Exception as error:
            self.value, self.error = None, error


def get(refs):
    if isinstance(refs, list):
        return [get(ref) for ref in refs]
    if refs.error is not None:
        raise refs.error
    return refs.value


class Handle:
    """Handle of an actor on a machine with a GPU; calls run immediately."""

    def __init__(self, actor):
        self._actor = actor

    def __getattr__(self, name):
        call = getattr(self._actor, name)
        if name == "take_number":
            return types.SimpleNamespace(remote=lambda *arguments: Ref(lambda *each: call(*each) or "a", arguments))
        return types.SimpleNamespace(remote=lambda *arguments: Ref(call, arguments))


def ask(stages, ticket):
    """Return the tokens of a micro-batch and of the one that follows it. Each answer comes with the next message."""
    messages = [Message(BATCHES[2], ticket=ticket), Message(FOLLOWING, buffer=1, ticket=ticket + 1, follows=ticket)]
    answers = []
    for message in (*messages, Message(None)):
        for stage in stages:
            message = stage.run(message)
        answers.append(message)
    assert answers[0].is_empty
    assert all(len(answer.seconds) == len(stages) for answer in answers[1:])
    return [[token for token, _ in answer.state.tokens] for answer in answers[1:]]


@pytest.mark.usefixtures("gpu")
def test_stages_with_shared_memory_answer_like_one_stage_and_can_rejoin(actors, expected, monkeypatch):  # noqa: F811
    monkeypatch.setattr(graph, "ray", types.SimpleNamespace(get=get))
    wanted = [[token for token, _ in tokens] for tokens in expected[2:4]]
    handles = [Handle(actor) for actor in actors]
    assert graph.join_stages(handles, "messages", 1)
    assert [type(actor.outgoing).__name__ for actor in actors] == ["GpuLink", "GpuLink", "NoneType"]
    assert [type(actor.incoming).__name__ for actor in actors] == ["NoneType", "GpuLink", "GpuLink"]
    assert actors[0].outgoing is not actors[1].incoming is actors[1].outgoing
    assert [type(actor.sampled_in).__name__ for actor in actors] == ["GpuTokenLink", "NoneType", "NoneType"]
    assert [type(actor.sampled_out).__name__ for actor in actors] == ["NoneType", "NoneType", "GpuTokenLink"]
    assert [actor.reader.is_late for actor in actors] == [False, False, True]
    assert ask(actors, 2) == wanted
    for actor in actors:
        actor.stop_waiting()
    with pytest.raises(RuntimeError, match="the stages were stopped"):
        actors[0].run(Message(FOLLOWING, ticket=4, follows=3))
    for actor in actors:
        actor.reset()
    assert graph.join_stages(handles, "messages", 5)
    assert ask(actors, 6) == wanted
