"""Lost stages end nothing in silence, and come back: the dead ones alone where that helps, else all of them."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from mortal_stages import collect, make_request, wait_for

from finlora.errors import ModelError, StageLostError
from finlora.serve.stage_states import AdapterRef


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
    assert (engine.snapshot.num_losses, engine.snapshot.num_repairs, engine.snapshot.recovery_s > 0) == (1, 0, True)


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


def test_snapshot_shows_no_work_while_the_stages_are_lost(make_engine, opened):
    wait = threading.Event()
    engine = make_engine(fail=lambda number: wait.wait(20) if number else None)

    async def lose():
        task = asyncio.ensure_future(collect(engine, make_request(0, 900)))
        while not (engine.snapshot.active and sum(engine.snapshot.busy)):
            await asyncio.sleep(0.02)
        opened[0].executor.is_dead.set()
        with pytest.raises(StageLostError):
            await task

    asyncio.run(lose())
    wait_for(lambda: engine.snapshot.num_losses == 1)
    shown = engine.snapshot
    assert (shown.active, shown.queue, shown.kv_used, shown.busy, shown.bubble) == (0, 0, 0, (0.0, 0.0), 0.0)
    wait.set()
    wait_for(lambda: engine.stages)


def test_stage_that_gives_no_sign_hangs_nobody(make_engine, opened, monkeypatch):
    monkeypatch.setattr("finlora.serve.live.handle._GRACE_S", 0.1)
    monkeypatch.setattr("finlora.serve.live.engine_thread._STUCK_S", 0.3)
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


def lose(engine, opened):
    """Kill the stages while nobody asks, and wait until they stand again."""
    num_cores = len(opened)
    opened[-1].executor.is_dead.set()
    wait_for(lambda: len(opened) > num_cores and engine.stages)


def test_dead_stages_come_back_alone_with_their_adapters(make_engine, opened, adapters, caplog):
    anew, repairs = [], []
    engine = make_engine(fail=anew.append, repair=lambda: repairs.append(1))
    ref = AdapterRef("a", adapters / "good" / "v1")
    before = asyncio.run(collect(engine, make_request(0, adapter="a"), ref))[0]

    async def ask_and_lose():
        tasks = [asyncio.ensure_future(collect(engine, make_request(n, 500))) for n in range(4)]
        await asyncio.sleep(0.2)
        opened[0].executor.is_dead.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(error) for error in asyncio.run(ask_and_lose())] == [StageLostError] * 4
    wait_for(lambda: len(opened) == 2 and engine.stages)
    assert (anew, repairs, list(opened[1].adapters)) == ([0], [1], ["a"])
    assert (engine.snapshot.num_losses, engine.snapshot.num_repairs) == (1, 1)
    assert "after the loss: the dead one was started alone" in caplog.text
    assert asyncio.run(collect(engine, make_request(0, adapter="a"), ref))[0] == before
    # It is still the one that gives way, unused for longest.
    for number, name in enumerate("bc"):
        asyncio.run(collect(engine, make_request(number, adapter=name), AdapterRef(name, adapters / "plain")))
    assert set(opened[1].adapters) == {"b", "c"}


def test_repair_that_fails_is_followed_by_a_new_start_of_all(make_engine, opened, caplog):
    def repair():
        raise ModelError("two of two are dead")

    engine = make_engine(repair=repair)
    before = asyncio.run(collect(engine, make_request(0)))[0]
    lose(engine, opened)
    assert "No stage could be restarted alone (ModelError: two of two are dead): all are started anew" in caplog.text
    assert "after the loss: all were started anew" in caplog.text
    assert asyncio.run(collect(engine, make_request(0)))[0] == before
    assert (engine.snapshot.num_losses, engine.snapshot.num_repairs) == (1, 0)


def test_stages_that_die_again_and_again_without_an_answer_are_all_started_anew(make_engine, opened, caplog):
    repairs = []
    engine = make_engine(repair=lambda: repairs.append(1))
    for _ in range(3):
        lose(engine, opened)
    assert len(repairs) == 2
    assert "Stages died 3 times without an answer in between: all are started anew" in caplog.text
    for _ in range(3):  # with an answer in between each is proven
        asyncio.run(collect(engine, make_request(0)))
        lose(engine, opened)
    assert len(repairs) == 5
