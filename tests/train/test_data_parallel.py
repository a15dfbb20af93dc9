"""Collectives of the workers, and DeepSpeed's settings for each optimiser."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

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
@pytest.mark.parametrize("workers", [1, 2])
def test_deepspeed_sees_the_adapter_alone_and_averages_what_the_optimiser_does_not(
    make_config, monkeypatch, kind, workers
):
    asked = {}

    def initialize(**settings):
        asked.update(settings)
        return SimpleNamespace(enable_backward_allreduce=None), None

    pretended = SimpleNamespace(
        ops=SimpleNamespace(__compatible_ops__={}), init_distributed=lambda **_: None, initialize=initialize
    )
    monkeypatch.setitem(sys.modules, "deepspeed", pretended)
    config = make_config(f"optim.name={kind.name}", "optim.max_grad_norm=0.5", f"train.num_workers={workers}")
    whole = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Dropout(0.5))
    whole[0].weight.requires_grad_(False)
    engine = make_engine(whole, None, config)
    assert engine.enable_backward_allreduce == (workers == 2 and not kind.averages_gradients)
    assert asked["config"]["gradient_clipping"] == 0.0
    assert asked["config"]["timers"]["throughput"] == {"enabled": False}
    seen = asked["model"]
    assert [id(parameter) for parameter in seen.parameters()] == [id(whole[0].bias)]
    seen.eval()
    x = torch.randn(4, 3)
    assert torch.equal(seen(x), whole(x))
    assert not whole[1].training
    assert seen.train() is seen
    assert whole[1].training
