"""Recovery from stage crashes: requests end with an error, and the crashed stages restart, or all if that fails."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest
from crashing_stages import collect, make_request, wait_for

from finlora.errors import ModelError, StageLostError
from finlora.serve.stage_states import AdapterRef


def test_crashed_stages_end_each_request_with_a_retriable_error_and_restart(make_engine, opened):
    engine = make_engine()
    before = asyncio.run(collect(engine, make_request(0)))[0]

    async def lose():
        tasks = [asyncio.ensure_future(collect(engine, make_request(n, 500))) for n in range(4)]
        await asyncio.sleep(0.2)
        opened[0].executor.has_crashed.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(lose())
    assert [type(error) for error in errors] == [StageLostError] * 4
    assert "crashed before the answer was complete: ask again" in str(errors[0])
    wait_for(lambda: engine.stages)
    assert len(opened) == 2
    assert asyncio.run(collect(engine, make_request(0)))[0] == before
    assert (engine.snapshot.num_losses, engine.snapshot.num_repairs, engine.snapshot.recovery_s > 0) == (1, 0, True)


def test_crash_of_an_idle_stage_is_noticed_and_requests_are_refused_at_once(make_engine, opened):
    wait = threading.Event()
    engine = make_engine(fail=lambda number: wait.wait(20) if number else None)
    opened[0].executor.has_crashed.set()
    wait_for(lambda: not engine.stages)
    started = time.monotonic()
    with pytest.raises(StageLostError, match=r"is being restarted: ask again in a few seconds"):
        asyncio.run(collect(engine, make_request(0)))
    assert time.monotonic() - started < 1
    wait.set()
    wait_for(lambda: engine.stages)


def test_snapshot_shows_no_work_while_stages_restart(make_engine, opened):
    wait = threading.Event()
    engine = make_engine(fail=lambda number: wait.wait(20) if number else None)

    async def lose():
        task = asyncio.ensure_future(collect(engine, make_request(0, 900)))
        while not (engine.snapshot.active and sum(engine.snapshot.busy)):
            await asyncio.sleep(0.02)
        opened[0].executor.has_crashed.set()
        with pytest.raises(StageLostError):
            await task

    asyncio.run(lose())
    wait_for(lambda: engine.snapshot.num_losses == 1)
    shown = engine.snapshot
    assert (shown.active, shown.queue, shown.kv_used, shown.busy, shown.bubble) == (0, 0, 0, (0.0, 0.0), 0.0)
    wait.set()
    wait_for(lambda: engine.stages)


def test_stage_that_hangs_ends_requests_after_their_deadline(make_engine, opened, monkeypatch):
    monkeypatch.setattr("finlora.serve.live.handle._GRACE_S", 0.1)
    monkeypatch.setattr("finlora.serve.live.engine_thread._STUCK_S", 0.3)
    engine = make_engine()
    stuck = opened[0].executor.is_stuck
    stuck.set()
    with pytest.raises(StageLostError, match="did not respond in time: ask again"):
        asyncio.run(collect(engine, make_request(0, deadline=time.monotonic() + 0.3)))
    wait_for(lambda: not engine.is_alive)
    stuck.clear()
    wait_for(lambda: engine.is_alive)
    assert asyncio.run(collect(engine, make_request(1)))[1].finish == "length"


def test_failed_restart_is_retried(make_engine, opened):
    attempts = []

    def fail(number):
        if number == 1 and not attempts:
            attempts.append(number)
            raise ModelError("the disk is gone")

    engine = make_engine(fail=fail)
    opened[0].executor.has_crashed.set()
    wait_for(lambda: attempts)
    with pytest.raises(StageLostError, match=r"could not be restarted \(the disk is gone\)|is being restarted"):
        asyncio.run(collect(engine, make_request(0)))
    wait_for(lambda: engine.stages)
    assert asyncio.run(collect(engine, make_request(0)))[1].finish == "length"


def lose(engine, opened):
    """Kill the stages of an idle server, and wait until they run again."""
    num_cores = len(opened)
    opened[-1].executor.has_crashed.set()
    wait_for(lambda: len(opened) > num_cores and engine.stages)


def test_repair_restarts_only_crashed_stages_and_keeps_adapters(make_engine, opened, adapters, caplog):
    opens, repairs = [], []
    engine = make_engine(fail=opens.append, repair=lambda: repairs.append(1))
    ref = AdapterRef("a", adapters / "good" / "v1")
    before = asyncio.run(collect(engine, make_request(0, adapter="a"), ref))[0]

    async def ask_and_lose():
        tasks = [asyncio.ensure_future(collect(engine, make_request(n, 500))) for n in range(4)]
        await asyncio.sleep(0.2)
        opened[0].executor.has_crashed.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(error) for error in asyncio.run(ask_and_lose())] == [StageLostError] * 4
    wait_for(lambda: len(opened) == 2 and engine.stages)
    assert (opens, repairs, list(opened[1].adapters)) == ([0], [1], ["a"])
    assert (engine.snapshot.num_losses, engine.snapshot.num_repairs) == (1, 1)
    assert "after the crash: only the crashed ones restarted" in caplog.text
    assert asyncio.run(collect(engine, make_request(0, adapter="a"), ref))[0] == before
    # It is still the least recently used one, so it is evicted.
    for number, name in enumerate("bc"):
        asyncio.run(collect(engine, make_request(number, adapter=name), AdapterRef(name, adapters / "plain")))
    assert set(opened[1].adapters) == {"b", "c"}


def test_failed_repair_restarts_all_stages(make_engine, opened, caplog):
    def repair():
        raise ModelError("two of two are dead")

    engine = make_engine(repair=repair)
    before = asyncio.run(collect(engine, make_request(0)))[0]
    lose(engine, opened)
    assert "could not be restarted alone (ModelError: two of two are dead): restarting all" in caplog.text
    assert "after the crash: all of them restarted" in caplog.text
    assert asyncio.run(collect(engine, make_request(0)))[0] == before
    assert (engine.snapshot.num_losses, engine.snapshot.num_repairs) == (1, 0)


def test_repeated_crashes_without_an_answer_restart_all_stages(make_engine, opened, caplog):
    repairs = []
    engine = make_engine(repair=lambda: repairs.append(1))
    for _ in range(3):
        lose(engine, opened)
    assert len(repairs) == 2
    assert "Stages crashed 3 times without an answer in between: restarting all" in caplog.text
    for _ in range(3):  # an answer in between resets the count
        asyncio.run(collect(engine, make_request(0)))
        lose(engine, opened)
    assert len(repairs) == 5
