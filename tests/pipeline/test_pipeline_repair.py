"""Repair of a pipeline: only crashed stages restart, the others keep process, weights and adapters, and answers are the same."""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
from engine_requests import RAGGED, generate_alone, make_requests, run, tokens_of

from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.errors import StageLostError
from finlora.model.source import find_source
from finlora.model.tokenizer import load_tokenizer

END, ROWS, STAGES = 1, 1024, 3


def open_pipeline(model, transport="messages"):
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    config = PipelineConfig(
        num_stages=STAGES, cache_rows=ROWS, device="cpu", cpus_per_stage=0.25, transport=transport, wait_s=20.0
    )
    return Pipeline(model, find_source(model).shape, 16, config, seed=0)


@pytest.fixture(scope="module")
def pipeline(four_layers, ray_instance):
    pipeline = open_pipeline(four_layers)
    yield pipeline
    pipeline.close()


@pytest.fixture(scope="module")
def own_adapters(adapter_folders, tmp_path_factory):
    """Copies of the adapters, which tests may change."""
    folder = tmp_path_factory.mktemp("own")
    for name, source in adapter_folders.items():
        shutil.copytree(source, folder / name)
    return folder


def make_core(pipeline, model):
    limits = Limits(cache_rows=ROWS, max_in_flight=STAGES, follows=pipeline.can_follow)
    core = EngineCore(pipeline, Scheduler(limits, END, lambda: 3), load_tokenizer(Path(model.base)))
    core.adapters |= pipeline.adapters
    return core


def look_at(pipeline):
    """Return each stage's process id and the address of its weights."""
    import ray

    def look(actor):
        return os.getpid(), actor.stage.layers[0].qkv.forward.__self__.weight.data_ptr()

    return ray.get([actor.__ray_call__.remote(look) for actor in pipeline.actors])


def kill_in_flight(pipeline, core, victim, num_steps=5):
    """Kill a stage while micro-batches are in flight; returns the seconds until StageLostError."""
    for request in make_requests(count=200):
        core.submit(request)
    for _ in range(num_steps):
        core.step()
    assert core.scheduler.num_in_flight
    os.kill(look_at(pipeline)[victim][0], signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(StageLostError, match=r"a stage of the model was lost .*: ask again"):
        run(core, [])
    return time.monotonic() - killed


def check_answers(core, plain, adapter=None):
    requests = make_requests(count=6)
    if adapter is not None:
        requests.append(Request(id="adapted", prompt_ids=RAGGED[2], adapter=adapter, sampling=Sampling(max_tokens=4)))
    answers, _ = run(core, requests)
    for number, prompt in enumerate(RAGGED):
        assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), prompt, 6)
    if adapter is not None:
        assert tokens_of(answers["adapted"]) == generate_alone(plain(adapter=adapter), RAGGED[2], 4)


@pytest.mark.parametrize("victim", [1, 0, 2])
def test_only_the_crashed_stage_restarts(pipeline, four_layers, plain, own_adapters, victim):
    core = make_core(pipeline, four_layers)
    if victim == 1:
        core.load_adapter("all", own_adapters / "all")
    check_answers(core, plain, "all")
    before = look_at(pipeline)
    assert kill_in_flight(pipeline, core, victim) < 5
    assert pipeline.repair() == [victim]
    after = look_at(pipeline)
    assert [number for number in range(STAGES) if after[number] != before[number]] == [victim]
    core = make_core(pipeline, four_layers)
    assert set(core.adapters) == {"all"}
    check_answers(core, plain, "all")
    assert len(core.meter.read().busy) == STAGES


def test_adapter_with_changed_files_is_unloaded_from_all_stages(pipeline, four_layers, plain, own_adapters, caplog):
    core = make_core(pipeline, four_layers)
    core.load_adapter("changing", own_adapters / "few")
    for file in (own_adapters / "all").iterdir():
        shutil.copy(file, own_adapters / "few" / file.name)
    os.kill(look_at(pipeline)[2][0], signal.SIGKILL)
    pipeline.repair()
    core = make_core(pipeline, four_layers)
    assert set(core.adapters) == {"all"}
    assert "Adapter changing cannot be loaded again and is dropped" in caplog.text
    assert "holds another adapter than a moment ago" in caplog.text
    core.load_adapter("changing", own_adapters / "few")
    check_answers(core, plain, "all")
    answers, _ = run(core, make_requests(RAGGED[:3], 4, adapter="changing"))
    assert tokens_of(answers["r2"]) == generate_alone(plain(adapter="all"), RAGGED[2], 4)


def test_restarted_stage_joins_a_new_process_group(four_layers, ray_instance, plain, adapter_folders):
    pipeline = open_pipeline(four_layers, "gloo")
    try:
        core = make_core(pipeline, four_layers)
        core.load_adapter("all", adapter_folders["all"])
        before = look_at(pipeline)
        kill_in_flight(pipeline, core, 0)  # the stage that offered the group's address
        assert pipeline.repair() == [0]
        after = look_at(pipeline)
        assert (after[0] != before[0], after[1:]) == (True, before[1:])
        check_answers(make_core(pipeline, four_layers), plain, "all")
        with pytest.raises(StageLostError, match="0 of 3 stages are dead: only a new pipeline helps"):
            pipeline.repair()
    finally:
        pipeline.close()


def test_stage_that_does_not_leave_the_graph_is_replaced(pipeline, four_layers, plain, monkeypatch, tmp_path):
    """Ray's graph sometimes does this; here a stage is made to block."""
    import ray

    from finlora.pipeline import pipeline as module

    monkeypatch.setattr(module, "_REPAIR_TIMEOUT_S", 0.5)

    def hold(actor):
        actor.stage.run = lambda *_: (tmp_path / "held").touch() or time.sleep(60)

    before = look_at(pipeline)
    ray.get(pipeline.actors[1].__ray_call__.remote(hold))
    core = make_core(pipeline, four_layers)
    for request in make_requests(count=6):
        core.submit(request)
    core.executor.start(core.scheduler.next_batch())
    until = time.monotonic() + 30
    while not (tmp_path / "held").exists():
        assert time.monotonic() < until
        time.sleep(0.02)
    os.kill(before[0][0], signal.SIGKILL)
    assert pipeline.repair() == [0, 1]
    assert look_at(pipeline)[2] == before[2]
    check_answers(make_core(pipeline, four_layers), plain, "all")


def test_idle_stage_that_stays_in_the_graph_is_killed_early(pipeline, four_layers, plain, monkeypatch, caplog):
    """Its loop still reads a channel that Ray closed; here a read is made to block."""
    import ray

    from finlora.pipeline import graph
    from finlora.pipeline import pipeline as module

    monkeypatch.setattr(graph, "_IDLE_TIMEOUT_S", 0.5)
    monkeypatch.setattr(module, "_REPAIR_TIMEOUT_S", 100.0)

    def hang(actor):
        from ray.experimental.channel.shared_memory_channel import CompositeChannel

        plain_read, plain_run, runs = CompositeChannel.read, actor.stage.run, []

        def run(*arguments):
            runs.append(arguments)
            return plain_run(*arguments)

        def read(channel, timeout=None):
            if runs:
                time.sleep(200)
            return plain_read(channel, timeout)

        actor.stage.run = run
        CompositeChannel.read = read

    before = look_at(pipeline)
    ray.get(pipeline.actors[1].__ray_call__.remote(hang))
    core = make_core(pipeline, four_layers)
    for request in make_requests(count=2):
        core.submit(request)
    core.step()  # the stage computes one message, and its next read blocks
    os.kill(before[0][0], signal.SIGKILL)
    assert pipeline.repair() == [0, 1]
    said = re.search(r"Stage 1 did not leave the graph in (\d+) s and is ended by force", caplog.text)
    assert int(said[1]) < 100
    assert look_at(pipeline)[2] == before[2]
    check_answers(make_core(pipeline, four_layers), plain, "all")
