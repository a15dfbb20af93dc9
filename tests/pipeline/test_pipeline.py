"""Stages in Ray actors: the same answers as transformers, adapters loaded in order, and resources freed."""

from __future__ import annotations

import math
import os
import shutil
import time
from pathlib import Path

import pytest
import ray
from engine_requests import RAGGED, generate_alone, make_requests, run, set_late_read, tokens_of
from safetensors.torch import load_file, save_file

from finlora.config import ModelConfig
from finlora.engine.admission import Limits
from finlora.engine.engine import EngineCore
from finlora.engine.request import Request, Sampling
from finlora.engine.scheduler import Scheduler
from finlora.errors import AdapterError, ResourceError, StageLostError
from finlora.model.source import find_source
from finlora.model.tokenizer import load_tokenizer

END, ROWS = 1, 1024
MISSING = "FINLORA_TEST_MISSING"


@pytest.fixture(scope="module")
def pipeline(four_layers, ray_instance):
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    config = PipelineConfig(num_stages=2, cache_rows=ROWS, device="cpu", cpus_per_stage=0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finlora.pipeline.pipeline.missing_environment", lambda: {MISSING: "here"})
        pipeline = Pipeline(four_layers, find_source(four_layers).shape, 16, config, seed=0)
    yield pipeline
    pipeline.close()


@pytest.fixture
def core(pipeline, four_layers, adapter_folders):
    limits = Limits(cache_rows=ROWS, max_in_flight=2, follows=pipeline.can_follow)
    core = EngineCore(pipeline, Scheduler(limits, END, lambda: 3), load_tokenizer(Path(four_layers.base)))
    core.load_adapter("few", adapter_folders["few"])
    yield core
    for name in list(core.adapters):
        core.unload_adapter(name)


@pytest.mark.ray
def test_stages_get_environment_variables_that_the_driver_lacks(pipeline):
    """A replica of `serve deploy` has the environment of `ray start`."""
    found = [actor.__ray_call__.remote(lambda _stage: os.environ[MISSING]) for actor in pipeline.actors]
    assert ray.get(found) == ["here", "here"]


def test_tokens_equal_transformers(core, plain):
    answers, _ = run(core, make_requests(count=6))
    for number, prompt in enumerate(RAGGED):
        assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), prompt, 6)


def test_late_read_changes_no_answer(pipeline, four_layers, adapter_folders, plain):
    """Links that run ahead read late too."""

    set_late_read(pipeline, is_late=True)
    # These stages return tokens through the host, which reads them late: no micro-batch may follow another.
    limits = Limits(cache_rows=ROWS, max_in_flight=2)
    core = EngineCore(pipeline, Scheduler(limits, END, lambda: 3), load_tokenizer(Path(four_layers.base)))
    core.load_adapter("few", adapter_folders["few"])
    for request in make_requests(count=6):
        core.submit(request)
    answers = {answer.request_id: answer for _ in range(3) for answer in core.step()}
    core.load_adapter("all", adapter_folders["all"])
    core.submit(Request(id="new", prompt_ids=RAGGED[2], adapter="all", sampling=Sampling(max_tokens=4)))
    answers |= run(core, [])[0]
    for name in list(core.adapters):
        core.unload_adapter(name)
    set_late_read(pipeline, is_late=False)
    for number, prompt in enumerate(RAGGED):
        assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), prompt, 6)
    assert tokens_of(answers["new"]) == generate_alone(plain(adapter="all"), RAGGED[2], 4)


def test_waiting_stages_use_little_cpu_time(pipeline):
    """Ray's own reads would use a whole core for each stage."""

    def look():
        return ray.get([actor.__ray_call__.remote(lambda _stage: time.process_time()) for actor in pipeline.actors])

    before, started = look(), time.monotonic()
    time.sleep(1.0)
    after, passed = look(), time.monotonic() - started
    assert all(new - old < 0.3 * passed for old, new in zip(before, after, strict=True))


def test_two_micro_batches_are_in_flight(core):
    for request in make_requests(count=6):
        core.submit(request)
    seen = []
    while not core.is_idle:
        core.step()
        seen.append(core.scheduler.num_in_flight)
    assert max(seen) == 2  # after one was collected, the other and the next one


def test_adapter_is_loaded_between_micro_batches_of_other_requests(core, plain, adapter_folders):
    for request in make_requests(count=10):
        core.submit(request)
    answers = [*core.step(), *core.step()]
    core.load_adapter("all", adapter_folders["all"])
    core.submit(Request(id="new", prompt_ids=RAGGED[2], adapter="all", sampling=Sampling(max_tokens=4)))
    while not core.is_idle:
        answers += core.step()
    by_name = {answer.request_id: answer for answer in answers}
    assert tokens_of(by_name["new"]) == generate_alone(plain(adapter="all"), RAGGED[2], 4)
    assert tokens_of(by_name["r4"]) == generate_alone(plain(), RAGGED[4], 10)


def test_error_of_a_stage_is_raised_and_the_pipeline_still_works(core, plain, tmp_path):
    with pytest.raises(AdapterError, match=r"adapter_model.safetensors is missing or cannot be read"):
        core.load_adapter("broken", tmp_path)
    answers, _ = run(core, make_requests(RAGGED[:2], 3))
    assert tokens_of(answers["r1"]) == generate_alone(plain(), RAGGED[1], 3)


def test_adapter_that_a_later_stage_refuses_is_unloaded_from_all(core, plain, late_fault, adapter_folders):
    import ray

    with pytest.raises(AdapterError, match=r"layers.3.self_attn.v_proj as \[24, 4\]"):
        core.load_adapter("late", late_fault)
    held = [actor.__ray_call__.remote(lambda self: sorted(self.stage.adapters)) for actor in core.executor.actors]
    assert ray.get(held) == [["few"], ["few"]]
    core.load_adapter("late", adapter_folders["all"])
    answers, _ = run(core, make_requests(RAGGED[:3], 4, adapter="late"))
    assert tokens_of(answers["r2"]) == generate_alone(plain(adapter="all"), RAGGED[2], 4)


def test_cluster_that_is_too_small_is_refused(four_layers, ray_instance):
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    config = PipelineConfig(num_stages=4, cache_rows=64, device="cuda")
    with pytest.raises(ResourceError, match=r"4 stages need 4 GPUs and the cluster has 0: choose fewer stages"):
        Pipeline(four_layers, find_source(four_layers).shape, 4, config, seed=0)


def test_stage_that_cannot_load_gives_the_reason_in_one_line(tiny_base, tmp_path, ray_instance):
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    folder = shutil.copytree(tiny_base, tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    # Only the stage that reads this tensor notices it; faulty file headers are refused before any stage starts.
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(tensors, folder / "model.safetensors")
    free = ray.available_resources()["CPU"]
    config = PipelineConfig(num_stages=2, cache_rows=64, device="cpu", cpus_per_stage=0.25)
    model = ModelConfig(base=str(folder), compute_dtype="float32")
    with pytest.raises(ResourceError, match=r"^a stage of the model cannot be loaded: ModelError: .*up_proj") as caught:
        Pipeline(model, find_source(model).shape, 8, config, seed=0)
    assert "\n" not in str(caught.value)
    deadline = time.monotonic() + 20
    while ray.available_resources()["CPU"] != free:
        assert time.monotonic() < deadline, "the resources of the stages were not freed"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("raised", "expected", "words"),
    [
        (
            RuntimeError("CUDA: an illegal access"),
            StageLostError,
            r"lost \(RuntimeError: CUDA: an illegal access\): ask",
        ),
        (AdapterError("no adapter"), AdapterError, "no adapter"),
    ],
)
def test_errors_of_a_stage_are_translated(ray_instance, raised, expected, words):
    from finlora.pipeline.ray_workarounds import translate_ray_errors

    @ray.remote(num_cpus=0, max_retries=0)
    def fail():
        raise raised

    with pytest.raises(expected, match=words), translate_ray_errors():
        ray.get(fail.remote())


def test_no_stage_starts_without_room_for_all_and_the_holder_is_named(four_layers, ray_instance, caplog):
    import ray

    from finlora.cluster.lease import list_holdings, take_lease
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    cores = ray.cluster_resources()["CPU"]
    free = ray.available_resources()["CPU"]
    # Room for one of the two stages. On a busy machine, the first look at the cluster can take seconds; it announces the wait.
    with take_lease([{"CPU": free - cores / 4}], 30.0, lambda _line: None, name="night-training"):
        config = PipelineConfig(num_stages=2, cache_rows=64, device="cpu", cpus_per_stage=cores / 4, wait_s=6.0)
        with pytest.raises(ResourceError, match=r"by night-training \(job .*Waited \d+ s"):
            Pipeline(four_layers, find_source(four_layers).shape, 16, config, seed=0)
        assert [each.what for each in list_holdings("CPU") if "StageActor" in each.what] == []
    assert "by night-training" in caplog.text


def test_hidden_states_by_torch_distributed_change_no_token(four_layers, ray_instance, plain, adapter_folders):
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    config = PipelineConfig(num_stages=3, cache_rows=ROWS, device="cpu", cpus_per_stage=0.25, transport="gloo")
    pipeline = Pipeline(four_layers, find_source(four_layers).shape, 16, config, seed=0)
    try:
        limits = Limits(cache_rows=ROWS, max_in_flight=3, follows=pipeline.can_follow)
        core = EngineCore(pipeline, Scheduler(limits, END, lambda: 3), load_tokenizer(Path(four_layers.base)))
        core.load_adapter("all", adapter_folders["all"])
        requests = make_requests(count=6)
        requests.append(Request(id="adapted", prompt_ids=RAGGED[2], adapter="all", sampling=Sampling(max_tokens=4)))
        answers, _ = run(core, requests)
        for number, prompt in enumerate(RAGGED):
            assert tokens_of(answers[f"r{number}"]) == generate_alone(plain(), prompt, 6)
        assert tokens_of(answers["adapted"]) == generate_alone(plain(adapter="all"), RAGGED[2], 4)
        assert len(core.meter.read().busy) == 3
        assert pipeline.peak_memory_gib() > 0
    finally:
        pipeline.close()
