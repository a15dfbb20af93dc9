"""Collectives of the workers, and DeepSpeed's settings for each optimiser."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from finlora.optim.optimizer import OPTIMIZERS
from finlora.train.data_parallel import choose_collectives, make_engine


@pytest.mark.parametrize(
    ("device", "gpus_per_worker", "backend"),
    [("cuda", 1.0, "nccl"), ("cuda", 2.0, "nccl"), ("cuda", 0.5, "gloo"), ("cpu", 1.0, "gloo")],
)
def test_workers_that_share_a_gpu_do_not_talk_over_nccl(make_config, device, gpus_per_worker, backend):
    config = make_config(f"train.device={device}", f"train.gpus_per_worker={gpus_per_worker}")
    assert choose_collectives(config) == backend


@pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_deepspeed_averages_and_clips_only_what_the_optimiser_does_not(make_config, monkeypatch, kind):
    asked = {}

    def initialize(**settings):
        asked.update(settings)
        return SimpleNamespace(enable_backward_allreduce=None), None

    pretended = SimpleNamespace(
        ops=SimpleNamespace(__compatible_ops__={}), init_distributed=lambda **_: None, initialize=initialize
    )
    monkeypatch.setitem(sys.modules, "deepspeed", pretended)
    config = make_config(f"optim.name={kind.name}", "optim.max_grad_norm=0.5")
    engine = make_engine(None, None, config)
    assert engine.enable_backward_allreduce == (not kind.averages_gradients)
    assert asked["config"]["gradient_clipping"] == (0.0 if kind.averages_gradients else 0.5)
