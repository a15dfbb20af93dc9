"""Choice of a worker's GPU, tested without one."""

from __future__ import annotations

import os

import ray.train.torch
import torch

from finlora.train.worker import _choose_device


def test_worker_takes_the_gpu_that_ray_gives_it_and_tells_deepspeed(make_config, monkeypatch):
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:2"))
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert _choose_device(make_config("train.device=cuda")) == torch.device("cuda:2")
    assert (chosen, os.environ["LOCAL_RANK"]) == ([torch.device("cuda:2")], "2")
