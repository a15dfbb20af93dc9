"""What workers talk over."""

from __future__ import annotations

import pytest

from finlora.train.data_parallel import choose_collectives


@pytest.mark.parametrize(
    ("device", "gpus_per_worker", "backend"),
    [("cuda", 1.0, "nccl"), ("cuda", 2.0, "nccl"), ("cuda", 0.5, "gloo"), ("cpu", 1.0, "gloo")],
)
def test_workers_that_share_a_gpu_do_not_talk_over_nccl(make_config, device, gpus_per_worker, backend):
    config = make_config(f"train.device={device}", f"train.gpus_per_worker={gpus_per_worker}")
    assert choose_collectives(config) == backend
