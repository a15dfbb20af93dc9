"""Stages on one GPU each, and two on each of two GPUs: the same answers as in one process, also after a crash."""

from __future__ import annotations

import pytest
import torch
from test_hidden_states_gpu import ROWS, ask_all, expected, look, lose_in_flight, name_outgoing  # noqa: F401  (a fixture)

NUM_STAGES = 4
FORMS = [(1.0, "messages"), (1.0, "nccl"), (0.5, "messages")]


def needs(num_gpus):
    is_missing = torch.cuda.device_count() < num_gpus
    return [pytest.mark.gpu, pytest.mark.skipif(is_missing, reason=f"needs {num_gpus} CUDA devices")]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(form, marks=needs(int(NUM_STAGES * form[0])), id=f"{form[1]}-{form[0]}-of-a-gpu") for form in FORMS
    ],
)
def pipeline(request, four_layers, ray_instance):
    from finlora.model.source import find_source
    from finlora.pipeline.pipeline import Pipeline, PipelineConfig

    gpus, transport = request.param
    config = PipelineConfig(
        num_stages=NUM_STAGES, cache_rows=ROWS, gpus_per_stage=gpus, cpus_per_stage=0.25, transport=transport
    )
    pipeline = Pipeline(four_layers, find_source(four_layers).shape, 16, config, seed=0)
    yield pipeline
    pipeline.close()


def test_stages_on_several_gpus_answer_like_one_stage(pipeline, expected, four_layers, adapter_folders):  # noqa: F811
    gpus = look(pipeline, lambda self: str(torch.cuda.get_device_properties(self.device).uuid))
    assert len(set(gpus)) == int(NUM_STAGES * pipeline._config.gpus_per_stage)
    shares_memory = pipeline._config.transport == "messages"
    link = "GpuLink" if shares_memory else "DistributedLink"
    assert name_outgoing(pipeline) == [link] * (NUM_STAGES - 1) + ["NoneType"]
    assert look(pipeline, lambda self: self.reader.is_late) == [False] * (NUM_STAGES - 1) + [shares_memory]
    for in_flight in (2, NUM_STAGES):
        assert ask_all(pipeline, four_layers, adapter_folders, in_flight)[0] == expected


@pytest.mark.parametrize("victim", [1, 3])
def test_restarted_stage_on_its_own_gpu_rejoins_the_others(
    victim,
    pipeline,
    expected,  # noqa: F811
    four_layers,
    adapter_folders,
):
    lose_in_flight(pipeline, four_layers, victim)
    assert victim in pipeline.repair()
    assert ask_all(pipeline, four_layers, adapter_folders, NUM_STAGES)[0] == expected
