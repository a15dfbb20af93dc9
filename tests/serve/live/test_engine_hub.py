"""Engine hub: an answer over a link equals the answer to a coroutine of the engine's own process."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import pickle
import socket
import stat
import tempfile
import warnings
from pathlib import Path

import pytest
from crashing_stages import collect, make_request, wait_for

from finlora.errors import (
    AdapterError,
    ConfigError,
    DatasetError,
    ModelError,
    QueueFullError,
    QuotaError,
    ResourceError,
    StageLostError,
)
from finlora.serve.accounts.keys import KeyRecord
from finlora.serve.accounts.quota import Quota
from finlora.serve.live.engine_hub import Hub
from finlora.serve.live.remote_engine import RemoteEngine
from finlora.serve.stage_states import AdapterRef

KEY = KeyRecord(id="desk", salt="s", hash="0" * 64)


@pytest.fixture
def open_hub():
    """Factory of hubs over engines, with a quota whose clock is stopped; closes them."""
    with contextlib.ExitStack() as stack:

        def build(engine):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fl-"))  # a socket's path must be short
            hub = Hub(engine, Quota(lambda: 0.0), Path(folder) / "hub")
            hub.start()
            stack.callback(hub.close)
            return hub

        yield build


@contextlib.asynccontextmanager
async def connected(hub):
    """A remote engine that has received the stages' state."""
    remote = await RemoteEngine.open(hub.path)
    following = asyncio.ensure_future(remote.follow())
    while not remote.stages:
        await asyncio.sleep(0.01)
    yield remote
    remote.close()
    await following


def test_answers_over_links_equal_those_to_own_coroutines(make_engine, open_hub, adapters):
    engine = make_engine()
    hub, ref = open_hub(engine), AdapterRef("good", adapters / "good" / "v1")
    requests = [make_request(n, adapter="good" if n % 2 else None) for n in range(8)]

    def ask(engine, number):
        return collect(engine, requests[number], ref if number % 2 else None)

    async def ask_all():
        async with connected(hub) as one, connected(hub) as other:
            answers = await asyncio.gather(*(ask((one, other)[number // 4], number) for number in range(8)))
            assert one.stages == engine.stages
            return answers

    for number, (text, answer) in enumerate(asyncio.run(ask_all())):
        own_text, own = asyncio.run(ask(engine, number))
        assert (text, [t.id for t in answer.tokens]) == (own_text, [t.id for t in own.tokens])
        # Batch sizes differ, and with them the order of additions.
        assert [t.log_prob for t in answer.tokens] == pytest.approx([t.log_prob for t in own.tokens], abs=1e-5)


def test_text_comes_over_the_link_piece_by_piece(make_engine, open_hub):
    hub = open_hub(make_engine())

    async def stream():
        async with connected(hub) as remote:
            return [event async for event in remote.ask(make_request(0, 12))]

    *pieces, answer = asyncio.run(stream())
    assert len(pieces) > 2
    assert sum(len(piece.tokens) for piece in pieces) == len(answer.tokens) == 12


def test_cancelled_requests_and_closed_links_free_their_cache_rows(make_engine, open_hub, opened):
    hub = open_hub(make_engine())

    async def leave():
        async with connected(hub) as staying:
            async with connected(hub) as leaving:
                left = asyncio.ensure_future(collect(leaving, make_request(1, 800)))
                async with contextlib.aclosing(staying.ask(make_request(0, 800))) as events:
                    await anext(events)
            with pytest.raises(StageLostError, match="the process that runs the model is gone: ask again"):
                await left
            return await collect(staying, make_request(2, 40))

    _, answer = asyncio.run(leave())
    assert len(answer.tokens) == 40
    wait_for(lambda: opened[0].is_idle)
    assert opened[0].scheduler.pool.num_held == 0


def test_crash_ends_requests_in_flight_and_restarted_stages_answer(make_engine, open_hub, opened):
    engine = make_engine()
    hub = open_hub(engine)

    async def lose():
        async with connected(hub) as remote:
            task = asyncio.ensure_future(collect(remote, make_request(0, 900)))
            await asyncio.sleep(0.2)
            opened[0].executor.has_crashed.set()
            with pytest.raises(StageLostError, match="crashed before the answer was complete"):
                await task
            async with asyncio.timeout(10):
                while remote.snapshot.num_losses == 0 or not remote.stages:
                    await asyncio.sleep(0.02)
            return (await collect(remote, make_request(1)))[1]

    assert asyncio.run(lose()).finish == "length"


def test_closing_hub_ends_requests_with_a_retriable_error(make_engine, open_hub):
    hub = open_hub(make_engine())

    async def close():
        async with connected(hub) as remote:
            task = asyncio.ensure_future(collect(remote, make_request(0, 900)))
            await asyncio.sleep(0.2)
            await asyncio.to_thread(hub.close)
            with pytest.raises(StageLostError, match="the process that runs the model is gone: ask again"):
                await task
            with pytest.raises(StageLostError, match="the process that runs the model is gone: ask again in a few"):
                remote.require_ready()

    asyncio.run(close())
    assert not hub.path.exists()


def test_hub_that_closes_right_after_a_connection_leaks_no_socket(make_engine, open_hub):
    engine = make_engine()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            hub = open_hub(engine)
            with socket.socket(socket.AF_UNIX) as guest:
                guest.connect(str(hub.path))
                hub.close()
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompt_ids": tuple(range(2000))}, ConfigError, "can need 2,008 tokens of cache"),
        ({"adapter": "absent"}, AdapterError, "adapter 'absent' is not loaded"),
    ],
)
def test_refusals_keep_their_messages_over_a_link(make_engine, open_hub, change, error, words):
    hub = open_hub(make_engine())

    async def ask():
        async with connected(hub) as remote:
            with pytest.raises(error, match=words):
                await collect(remote, dataclasses.replace(make_request(0), **change))
            return (await collect(remote, make_request(0)))[1]

    assert asyncio.run(ask()).finish == "length"


def test_keys_are_counted_once_for_all_processes(make_engine, open_hub):
    hub = open_hub(make_engine())
    few = dataclasses.replace(KEY, requests_per_minute=3)
    tokens = dataclasses.replace(KEY, id="tokens", tokens_per_minute=100)

    async def count():
        async with connected(hub) as one, connected(hub) as other:
            await asyncio.gather(one.admit(few), other.admit(few), one.admit(few))
            with pytest.raises(QuotaError, match=r"key 'desk' may use 3 requests a minute") as refusal:
                await other.admit(few)
            await one.admit(KEY)  # a key without limits is not counted
            await one.admit(tokens)
            one.take_tokens(tokens, 160)
            while True:  # take_tokens has no reply, so the other link may be handled first
                try:
                    await other.admit(tokens)
                except QuotaError as error:
                    return refusal.value.retry_after_s, error.retry_after_s
                await asyncio.sleep(0.01)

    assert asyncio.run(count()) == (60, 60)


def test_only_this_user_can_open_the_socket(make_engine, open_hub):
    hub = open_hub(make_engine())
    assert stat.S_IMODE(hub.path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "error",
    [
        *(ConfigError(["a", "b"]), DatasetError("d"), ModelError("m"), AdapterError("a"), ResourceError("r")),
        *(QueueFullError("q"), QuotaError("q", 7), StageLostError("s")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    back = pickle.loads(pickle.dumps(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
