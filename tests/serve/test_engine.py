"""The engine for coroutines: each gets its own answer, who leaves frees what it held, lost stages end nothing in silence."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
import time

import pytest
from live_server import make_settings, open_in_process

from finlora.engine.drive import InProcess
from finlora.engine.request import Answer, Request, Sampling
from finlora.errors import AdapterError, ConfigError, ModelError, QueueFullError, StageLostError
from finlora.serve.engine import AsyncEngine
from finlora.serve.stages import AdapterRef

PROMPTS = [tuple(range(3 + n, 20 + 3 * n)) for n in range(8)]


class Mortal(InProcess):
    """Stages of this process that die when they are told to."""

    def __init__(self, stages) -> None:
        super().__init__(stages)
        self.is_dead, self.is_stuck = threading.Event(), threading.Event()

    def collect(self):
        while self.is_stuck.is_set():
            time.sleep(0.02)
        if self.is_dead.is_set():
            raise OSError("the process of the stage is gone")
        return super().collect()

    def check(self) -> None:
        if self.is_dead.is_set():
            raise OSError("the process of the stage is gone")


@pytest.fixture
def opened():
    """Every core that an engine opened, the newest last."""
    return []


@pytest.fixture
def make_engine(tiny_base, opened):
    engines = []

    def build(max_adapters=2, fail=lambda _number: None, **stages):
        config = make_settings(tiny_base, stages={"num": 2, "device": "cpu", "cache_rows": 1024} | stages)

        def open_core():
            fail(len(opened))
            core = open_in_process(config, Mortal)
            core = dataclasses.replace(core, check=core.core.executor.check)
            opened.append(core.core)
            return core

        engine = AsyncEngine(open_core, max_adapters, 0.05)
        engine.start()
        engines.append(engine)
        return engine

    yield build
    for engine in engines:
        engine.close()


def make_request(number, count=8, **changes):
    return Request(id=f"r{number}", prompt_ids=PROMPTS[number], sampling=Sampling(max_tokens=count), **changes)


async def collect(engine, request, adapter=None):
    pieces = []
    async for event in engine.ask(request, adapter):
        if isinstance(event, Answer):
            return "".join(pieces), event
        pieces.append(event)
    raise AssertionError


def wait_for(is_so, seconds=20.0):
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_many_at_once_answer_as_one_alone(make_engine):
    engine = make_engine()

    async def all_at_once():
        return await asyncio.gather(*(collect(engine, make_request(n)) for n in range(8)))

    together = asyncio.run(all_at_once())
    for number, (text, answer) in enumerate(together):
        alone_text, alone = asyncio.run(collect(engine, make_request(number)))
        assert answer.request_id == f"r{number}"
        assert (text, [t.id for t in answer.tokens]) == (alone_text, [t.id for t in alone.tokens])


def test_who_leaves_frees_the_rows_and_the_others_go_on(make_engine, opened):
    engine = make_engine()

    async def leave():
        staying = asyncio.ensure_future(collect(engine, make_request(1, 40)))
        async with contextlib.aclosing(engine.ask(make_request(0, 800))) as events:
            await anext(events)
        return await staying

    _, answer = asyncio.run(leave())
    assert len(answer.tokens) == 40
    wait_for(lambda: opened[0].is_idle)
    assert opened[0].scheduler.pool.num_held == 0


def test_cancelled_task_leaves_nothing_behind(make_engine, opened):
    engine = make_engine()

    async def cancel():
        task = asyncio.ensure_future(collect(engine, make_request(0, 800)))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    wait_for(lambda: opened[0].is_idle)


def test_deadline_ends_the_answer(make_engine):
    request = make_request(0, 900, deadline=time.monotonic() + 0.1)
    _, answer = asyncio.run(collect(make_engine(), request))
    assert answer.finish == "deadline"
    assert len(answer.tokens) < 900


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompt_ids": tuple(range(2000))}, ConfigError, "can need 2,008 tokens of cache"),
        ({"adapter": "absent"}, AdapterError, "adapter 'absent' is not loaded"),
    ],
)
def test_request_that_can_never_be_answered_is_refused_and_the_others_go_on(make_engine, change, error, words):
    engine = make_engine()
    with pytest.raises(error, match=words):
        asyncio.run(collect(engine, dataclasses.replace(make_request(0), **change)))
    assert asyncio.run(collect(engine, make_request(0)))[1].finish == "length"


def test_adapter_unused_for_longest_gives_way_and_one_at_work_never(make_engine, adapters, opened):
    engine = make_engine(max_adapters=2)
    refs = {
        name: AdapterRef(name, adapters / path) for name, path in (("a", "good/v1"), ("b", "good/v2"), ("c", "plain"))
    }

    def ask(number, name, count=4):
        return collect(engine, make_request(number, count, adapter=name), refs[name])

    texts = {name: asyncio.run(ask(0, name))[0] for name in "aba"}
    asyncio.run(ask(0, "c"))
    assert set(opened[0].adapters) == {"a", "c"}
    assert asyncio.run(ask(0, "b"))[0] == texts["b"]

    async def all_busy():
        gate = threading.Event()
        engine._calls.put(lambda _core: gate.wait(10))  # all three come between the same two steps
        tasks = [asyncio.ensure_future(ask(number, name)) for number, name in enumerate("bca")]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    *answered, refused = asyncio.run(all_busy())
    assert answered[0][0] == texts["b"]
    assert isinstance(refused, QueueFullError)
    assert "all 2 places for adapters are at work" in str(refused)


def test_lost_stages_end_each_request_with_a_retriable_error_and_come_back(make_engine, opened):
    engine = make_engine()
    before = asyncio.run(collect(engine, make_request(0)))[0]

    async def lose():
        tasks = [asyncio.ensure_future(collect(engine, make_request(n, 500))) for n in range(4)]
        await asyncio.sleep(0.2)
        opened[0].executor.is_dead.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(lose())
    assert [type(error) for error in errors] == [StageLostError] * 4
    assert "died before the answer was complete: ask again" in str(errors[0])
    wait_for(lambda: engine.stages)
    assert len(opened) == 2
    assert asyncio.run(collect(engine, make_request(0)))[0] == before
    assert (engine.snapshot.num_losses, engine.snapshot.recovery_s > 0) == (1, True)


def test_idle_stage_that_dies_is_noticed_and_requests_are_refused_at_once(make_engine, opened):
    wait = threading.Event()
    engine = make_engine(fail=lambda number: wait.wait(20) if number else None)
    opened[0].executor.is_dead.set()
    wait_for(lambda: not engine.stages)
    started = time.monotonic()
    with pytest.raises(StageLostError, match=r"is being restarted: ask again in a few seconds"):
        asyncio.run(collect(engine, make_request(0)))
    assert time.monotonic() - started < 1
    wait.set()
    wait_for(lambda: engine.stages)


def test_stage_that_gives_no_sign_hangs_nobody(make_engine, opened, monkeypatch):
    monkeypatch.setattr("finlora.serve.engine._GRACE_S", 0.1)
    monkeypatch.setattr("finlora.serve.engine._STUCK_S", 0.3)
    engine = make_engine()
    stuck = opened[0].executor.is_stuck
    stuck.set()
    with pytest.raises(StageLostError, match="gave no sign of life: ask again"):
        asyncio.run(collect(engine, make_request(0, deadline=time.monotonic() + 0.3)))
    wait_for(lambda: not engine.is_alive)
    stuck.clear()
    wait_for(lambda: engine.is_alive)
    assert asyncio.run(collect(engine, make_request(1)))[1].finish == "length"


def test_restart_that_fails_is_tried_again(make_engine, opened):
    attempts = []

    def fail(number):
        if number == 1 and not attempts:
            attempts.append(number)
            raise ModelError("the disk is gone")

    engine = make_engine(fail=fail)
    opened[0].executor.is_dead.set()
    wait_for(lambda: attempts)
    with pytest.raises(StageLostError, match=r"could not be restarted \(the disk is gone\)|is being restarted"):
        asyncio.run(collect(engine, make_request(0)))
    wait_for(lambda: engine.stages)
    assert asyncio.run(collect(engine, make_request(0)))[1].finish == "length"


def test_first_start_that_fails_is_raised(tiny_base):
    def fail():
        raise ModelError("no such base")

    engine = AsyncEngine(fail, 1, 1.0)
    with pytest.raises(ModelError, match="no such base"):
        engine.start()


def test_shutting_down_ends_what_is_under_way(make_engine):
    engine = make_engine()

    async def close():
        task = asyncio.ensure_future(collect(engine, make_request(0, 900)))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.close)
        with pytest.raises(StageLostError, match="the server shut down before the answer was complete"):
            await task

    asyncio.run(close())
    with pytest.raises(StageLostError, match="shutting down"):
        engine.require_ready()


def test_snapshot_tells_of_work(make_engine):
    engine = make_engine()

    async def watch():
        task = asyncio.ensure_future(collect(engine, make_request(0, 700)))
        seen = []
        while not task.done():
            await asyncio.sleep(0.05)
            seen.append(engine.snapshot)
        await task
        return seen

    busiest = max(asyncio.run(watch()), key=lambda snapshot: snapshot.kv_used)
    assert (busiest.active, busiest.kv_total) == (1, 1024)
    assert busiest.kv_used >= 717
    assert len(busiest.busy) == 2
    assert all(0 <= share <= 1 for share in busiest.busy)
