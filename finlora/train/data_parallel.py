"""DeepSpeed engine around a worker's copy of the model, and the backend of its collectives. No Ray here."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

import torch

from finlora.config import RunConfig
from finlora.machine.lean_imports import lean_imports
from finlora.optim.optimizer import find_optimizer
from finlora.precision import is_autocast


def choose_collectives(config: RunConfig) -> str:
    """Return the backend of torch.distributed."""
    # NCCL refuses two ranks on one GPU, so workers that share a GPU talk over gloo.
    return "nccl" if config.train.device == "cuda" and config.train.gpus_per_worker >= 1 else "gloo"


@contextlib.contextmanager
def _without_module(name: str) -> Iterator[None]:
    """Make a module that is not imported yet look not installed inside."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
    try:
        yield
    finally:
        del sys.modules[name]


class _TrainableOnly(torch.nn.Module):
    """Module that shows DeepSpeed the adapter's parameters alone, and runs the whole forward pass.

    DeepSpeed broadcasts every parameter that it sees at the start, the frozen base too, and walks through all modules several
    times a step: 15 ms for the 900 modules of a small Llama, longer than its forward and backward pass on a GPU.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self._whole = (module,)  # a tuple hides it from DeepSpeed
        trainable = (parameter for parameter in module.parameters() if parameter.requires_grad)
        self.trainable = torch.nn.ParameterList(trainable)

    def forward(self, *inputs: Any) -> Any:
        return self._whole[0](*inputs)

    def train(self, mode: bool = True) -> _TrainableOnly:
        """Set the mode of the whole module."""
        self._whole[0].train(mode)
        return super().train(mode)


def make_engine(module: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> Any:
    """Return DeepSpeed's engine at ZeRO stage 0. The caller scales the loss, the optimiser clips the gradients.

    Args:
        module: with the same frozen weights on each worker.
    """
    averages_itself = find_optimizer(config.optim.name).averages_gradients
    logging.getLogger("DeepSpeed").setLevel(
        logging.WARNING
    )  # before its first line, and again, since its import sets it
    with (
        lean_imports(),
        _without_module("mlflow"),
    ):  # DeepSpeed's autotuner imports it where it is installed, which takes seconds
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile its shared-memory collective with g++ (30 s); gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=choose_collectives(config), verbose=False)
    engine, *_ = deepspeed.initialize(
        model=_TrainableOnly(module),
        optimizer=optimizer,
        dist_init_required=False,
        config={
            # The loop scales the loss and decides when to step; DeepSpeed's own counts are not used.
            "train_micro_batch_size_per_gpu": 1,
            "managed_gradient_accumulation": False,
            "zero_optimization": {"stage": 0},
            "torch_autocast": {"enabled": is_autocast(config), "dtype": "bfloat16"},
            "gradient_clipping": 0.0,
            "steps_per_print": None,
            # It would wait for the GPU twice a step, so that the host could prepare nothing meanwhile.
            "timers": {"throughput": {"enabled": False}},
        },
    )
    # Alone, a worker would copy its gradients to the host and back for nothing where it shares a GPU and so talks over gloo.
    engine.enable_backward_allreduce = not averages_itself and config.train.num_workers > 1
    return engine
