"""Pipeline whose stages share one GPU and its memory: the same answers as in one process, also after a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from engine_requests import ON_GPU, RAGGED, make_requests, run, tokens_of
from test_pipeline_repair import kill_in_flight

from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.source import find_source
from finlora.model.tokenizer import load_tokenizer
from finlora.pipeline.graph import join_stages
from finlora.stage.stage import Stage

DEVICE, END, ROWS = "cuda", 1, 1024


def open_core(executor, base, in_flight):
    limits = Limits(cache_rows=ROWS, max_in_flight=in_flight, follows=executor.can_follow)
    return EngineCore(executor, Scheduler(limits, END, lambda: 3), load_tokenizer(Path(base.base)))


def ask_all(executor, base, adapter_folders, in_flight):
    """Return the tokens of all answers, and the meter's reading."""
    core = open_core(executor, base, in_flight)
    core.load_adapter("all", adapter_folders["all"])
    requests = make_requests(count=6)
    requests.append(Request(id="adapted", prompt_ids=RAGGED[2], adapter="all", sampling=Sampling(max_tokens=4)))
    answers, _ = run(core, requests)
    core.unload_adapter("all")
    return {name: tokens_of(answer) for name, answer in answers.items()}, core.meter.read()


def look(pipeline, at):
    """Run a function of the actor in each stage and return the results."""
    import ray

    return ray.get([actor.__ray_call__.remote(at) for actor in pipeline.actors])


def name_outgoing(pipeline):
    """Return the class of each stage's link to the next."""
    return look(pipeline, lambda self: type(self.outgoing).__name__)


def lose_in_flight(pipeline, base, victim):
    """Kill one of four stages while micro-batches are in flight; returns the process ids of all stages before."""
    before = look(pipeline, lambda _stage: os.getpid())
    kill_in_flight(pipeline, open_core(pipeline, base, 4), victim, num_steps=9)
    return before


@pytest.fixture(scope="module")
def expected(four_layers, adapter_folders):
    """Tokens of one stage in this process, on the same device: on a CPU the random weights differ."""
    with quiet_bitsandbytes():
        base = load_base(four_layers, 16, torch.device(DEVICE), 0)
        alone = InProcess([Stage(base.model, range(4), ROWS, torch.float32)])
    return ask_all(alone, four_layers, adapter_folders, 1)[0]


@pytest.fixture(scope="module")
def pipeline(four_layers, ray_instance):
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    config = PipelineConfig(num_stages=4, cache_rows=ROWS, device=DEVICE, gpus_per_stage=0.25, cpus_per_stage=0.25)
    pipeline = Pipeline(four_layers, find_source(four_layers).shape, 16, config, seed=0)
    yield pipeline
    pipeline.close()


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
def test_four_stages_on_one_gpu_answer_like_one_stage(_gpu, pipeline, expected, four_layers, adapter_folders):
    assert name_outgoing(pipeline) == ["GpuLink", "GpuLink", "GpuLink", "NoneType"]
    assert look(pipeline, lambda self: type(self.sampled_in).__name__)[0] == "GpuTokenLink"
    assert look(pipeline, lambda self: type(self.sampled_out).__name__)[3] == "GpuTokenLink"
    found, reading = ask_all(pipeline, four_layers, adapter_folders, 4)  # so that several send buffers are in use
    assert found == expected
    assert len(reading.busy) == 4
    assert all(0 < share < 1 for share in reading.busy)
    assert pipeline.peak_memory_gib() > 4 * 2 / 1024  # 2 MiB of a parcel per stage, beside the weights


@pytest.mark.parametrize("_gpu", [pytest.param(None, marks=ON_GPU)])
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_crashed_stage_restarts_and_shares_memory_again(_gpu, victim, pipeline, expected, four_layers, adapter_folders):
    """Work that the other stages have queued waits for it on the GPU."""
    before = lose_in_flight(pipeline, four_layers, victim)
    assert pipeline.repair() == [victim]
    after = look(pipeline, lambda _stage: os.getpid())
    assert [number for number in range(4) if after[number] != before[number]] == [victim]
    assert ask_all(pipeline, four_layers, adapter_folders, 4)[0] == expected


@pytest.mark.parametrize("failing", [None, 1, 2])
def test_stages_that_cannot_share_memory_use_messages_and_say_why(failing, ray_instance, caplog):
    import ray

    @ray.remote(num_cpus=0)
    class Pretending:
        """Stage on one of two machines; CUDA fails on one of them."""

        def __init__(self, number):
            self.number, self.outgoing = number, None

        def take_number(self, number, num_stages):
            return "one" if number < 3 else "another"

        def offer_tokens(self, transport):
            assert transport == "socket"
            return self.number

        def join_tokens(self, transport, offer):
            assert {offer, self.number} == {0, 3}
            return False

        def offer_hidden_states(self, transport, ticket):
            assert ticket == 7
            if transport == "gpu":
                self._fail(1)
            return self.number

        def join_hidden_states(self, transport, offer, rank, size):
            assert (offer, size) == (self.number - rank, 2)
            if transport == "gpu" and rank == 1:
                self._fail(2)
            if rank == 0:
                self.outgoing = transport
            return transport == "gpu"

        def _fail(self, number):
            if number == self.number == failing:
                raise RuntimeError("CUDA: cudaErrorMapBufferObjectFailed")

    actors = [Pretending.remote(number) for number in range(4)]
    assert not join_stages(actors, "messages", 7)  # answers are not read late
    outgoing = ray.get([actor.__ray_call__.remote(lambda self: self.outgoing) for actor in actors])
    assert outgoing == ["gpu", "gpu" if failing is None else "messages", "messages", None]
    said = "Stages 1 and 2 do not reach each other's GPU memory (RuntimeError: CUDA: cudaErrorMapBufferObjectFailed): their"
    assert (said in caplog.text) == (failing is not None)
    for actor in actors:
        ray.kill(actor)
