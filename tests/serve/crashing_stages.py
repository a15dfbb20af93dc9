"""Stages in this process that crash when a test says so, and requests for them."""

from __future__ import annotations

import dataclasses
import threading
import time

from live_server import make_settings, open_in_process

from finlora.engine.engine import EngineCore
from finlora.engine.request import Answer, Request, Sampling
from finlora.inference.in_process import InProcess
from finlora.serve.live.engine_thread import AsyncEngine
from finlora.serve.served_model import make_scheduler, read_base

PROMPTS = [tuple(range(3 + n, 20 + 3 * n)) for n in range(8)]


class CrashingStages(InProcess):
    """Stages in this process that crash or hang when a test sets an event."""

    def __init__(self, stages) -> None:
        super().__init__(stages)
        self.has_crashed, self.is_stuck = threading.Event(), threading.Event()

    def collect(self):
        while self.is_stuck.is_set():
            time.sleep(0.02)
        if self.has_crashed.is_set():
            raise OSError("the process of the stage is gone")
        return super().collect()

    def check(self) -> None:
        if self.has_crashed.is_set():
            raise OSError("the process of the stage is gone")


def open_crashing(config, opened, repair=None):
    """Open a core and append it to `opened`; `repair` is called before a repair, which makes a new core over the same stages."""
    found = open_in_process(config, CrashingStages)

    def describe(core):
        opened.append(core)
        return dataclasses.replace(found, core=core, check=core.executor.check, repair=restart if repair else None)

    def restart():
        repair()
        old, executor = opened[-1], CrashingStages(found.core.executor.stages)
        core = EngineCore(executor, make_scheduler(config, read_base(config), 2, follows=True), old.tokenizer)
        core.adapters |= old.adapters
        return describe(core)

    return describe(found.core)


def make_engine_of(tiny_base, opened, max_adapters=2, fail=lambda _number: None, repair=None, **stages):
    """Start an engine over such stages; `fail` gets the number of cores opened so far, before each new one."""
    config = make_settings(tiny_base, stages={"num": 2, "device": "cpu", "cache_rows": 1024} | stages)

    def open_core():
        fail(len(opened))
        return open_crashing(config, opened, repair)

    engine = AsyncEngine(open_core, max_adapters, 0.05)
    engine.start()
    return engine


def make_request(number, count=8, **changes):
    return Request(id=f"r{number}", prompt_ids=PROMPTS[number], sampling=Sampling(max_tokens=count), **changes)


async def collect(engine, request, adapter=None):
    pieces = []
    async for event in engine.ask(request, adapter):
        if isinstance(event, Answer):
            return "".join(pieces), event
        pieces.append(event.text)
    raise AssertionError


def wait_for(is_so, seconds=20.0):
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)
