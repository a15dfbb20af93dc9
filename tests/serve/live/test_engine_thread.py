"""Engine thread: each coroutine gets its own answer, and a cancelled request frees its cache rows."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import threading
import time

import pytest
from crashing_stages import collect, make_request, wait_for

from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.micro_batch import Output
from finlora.engine.request import Request
from finlora.engine.scheduler import Scheduler
from finlora.errors import AdapterError, ConfigError, ModelError, QueueFullError, StageLostError
from finlora.serve.live.engine_thread import AsyncEngine
from finlora.serve.stage_states import AdapterRef, OpenCore


class SlowStage:
    """One stage in a thread that takes equal time for each micro-batch and records how many labels each scores."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._inbox, self._outbox = queue.SimpleQueue(), queue.SimpleQueue()
        self.sizes, self.was_ahead = [], []
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        ended = 0.0
        while (sent := self._inbox.get()) is not None:
            batch, sent_at = sent
            self.sizes.append(len(batch.scores))
            self.was_ahead.append(sent_at < ended)
            time.sleep(self._seconds)
            ended = time.monotonic()
            self._outbox.put(Output(batch.number, (), [-1.0] * len(batch.scores), [self._seconds]))

    def start(self, batch) -> None:
        self._inbox.put((batch, time.monotonic()))

    def collect(self):
        return self._outbox.get()

    def close(self) -> None:
        self._inbox.put(None)


def test_concurrent_requests_get_the_answers_of_single_ones(make_engine):
    engine = make_engine()

    async def all_at_once():
        return await asyncio.gather(*(collect(engine, make_request(n)) for n in range(8)))

    together = asyncio.run(all_at_once())
    for number, (text, answer) in enumerate(together):
        alone_text, alone = asyncio.run(collect(engine, make_request(number)))
        assert answer.request_id == f"r{number}"
        assert (text, [t.id for t in answer.tokens]) == (alone_text, [t.id for t in alone.tokens])


def test_abandoned_request_frees_its_rows_and_others_continue(make_engine, opened):
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


def test_cancelled_task_leaves_the_engine_idle(make_engine, opened):
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
def test_impossible_request_is_refused_and_others_continue(make_engine, change, error, words):
    engine = make_engine()
    with pytest.raises(error, match=words):
        asyncio.run(collect(engine, dataclasses.replace(make_request(0), **change)))
    assert asyncio.run(collect(engine, make_request(0)))[1].finish == "length"


def test_least_recently_used_adapter_is_evicted_but_never_one_in_use(make_engine, adapters, opened):
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
        engine._calls.put(lambda _core: gate.wait(10))  # all three arrive between the same two steps
        tasks = [asyncio.ensure_future(ask(number, name)) for number, name in enumerate("bca")]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    *answered, refused = asyncio.run(all_busy())
    assert answered[0][0] == texts["b"]
    assert isinstance(refused, QueueFullError)
    assert "requests in flight use all 2 adapters that fit (max_adapters)" in str(refused)


def test_requests_that_cannot_start_do_not_spin_the_engine(make_engine, opened, monkeypatch):
    engine = make_engine()
    core, steps = opened[0], []
    step = core.step
    monkeypatch.setattr(core, "step", lambda on_text: steps.append(time.monotonic()) or step(on_text))
    asyncio.run(collect(engine, make_request(1)))
    full = core.scheduler.pool.allocate(None, (), 1024, None)  # as if others held every row
    steps.clear()

    async def wait():
        waiting = asyncio.ensure_future(collect(engine, make_request(0)))
        late = asyncio.ensure_future(collect(engine, make_request(2, deadline=time.monotonic() + 0.3)))
        await asyncio.sleep(1.0)
        num_steps = len(steps)
        assert (await late)[1].finish == "deadline"
        engine._calls.put(lambda core: core.scheduler.pool.release(full))
        return num_steps, (await waiting)[1].finish

    num_steps, finish = asyncio.run(wait())
    assert num_steps <= 1.0 / 0.05 + 4  # one per health check, and one per call
    assert finish == "length"


def test_requests_that_arrive_while_a_stage_computes_form_one_micro_batch(monkeypatch):
    monkeypatch.setattr("finlora.engine.engine._MOST_SPARE_S", 1.0)
    stage = SlowStage(0.6)
    scheduler = Scheduler(Limits(cache_rows=4096, max_in_flight=1, max_batch_tokens=2048), -1, lambda: 0)
    core = EngineCore(stage, scheduler, None)
    engine = AsyncEngine(lambda: OpenCore(core=core, stages=(), check=lambda: None, close=stage.close), 1, 5.0)
    engine.start()

    async def ask(number, delay_s=0.0):
        await asyncio.sleep(delay_s)
        prompt = tuple(range(number, number + 64))
        await engine.answer(Request(id=f"q{number}", prompt_ids=prompt, choices=((1,),)))

    async def ask_all():
        await ask(1000)  # lets the engine measure a micro-batch
        # The engine's thread has 0.1 s to take the first request alone; the others arrive in the 0.2 s after.
        await asyncio.gather(ask(0), *(ask(number, 0.1 + 0.01 * number) for number in range(1, 21)))

    asyncio.run(ask_all())
    engine.close()
    # Requests of the first 450 of 600 ms form one micro-batch, which is queued before the previous one ends.
    assert stage.sizes == [1, 1, 20]
    assert stage.was_ahead == [False, False, True]


def test_failed_first_start_is_raised(tiny_base):
    def fail():
        raise ModelError("no such base")

    engine = AsyncEngine(fail, 1, 1.0)
    with pytest.raises(ModelError, match="no such base"):
        engine.start()


def test_shutdown_ends_requests_in_flight(make_engine):
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


def test_snapshot_shows_requests_in_flight(make_engine):
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


def test_snapshot_of_an_idle_server_shows_no_work_once_the_work_is_done(make_engine):
    engine, seen = make_engine(), []
    note = engine._note
    engine._note = lambda **changes: note(**changes) or seen.append(engine.snapshot)
    asyncio.run(collect(engine, make_request(0, 300)))
    wait_for(lambda: any(sum(snapshot.busy) > 0 for snapshot in seen))  # a snapshot has seen the work
    wait_for(lambda: engine.snapshot.busy == (0.0, 0.0))
    assert (engine.snapshot.active, engine.snapshot.queue, engine.snapshot.bubble) == (0, 0, 0.0)
