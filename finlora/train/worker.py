"""Data-parallel QLoRA under Ray Train v2: each worker holds a copy of the base and a DeepSpeed engine at ZeRO stage 0.

The base is frozen and quantised, so there is nothing for ZeRO to shard; DeepSpeed brings bf16 autocast, gradient
reduction and clipping. Adapter and optimiser state are float32.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from finlora import cluster
from finlora.config import RunConfig
from finlora.configfile import config_from_tree, config_to_tree
from finlora.errors import FinloraError
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.lora import attach_lora, trainable_parameters
from finlora.results import Result, append_result
from finlora.train.checkpoint import CheckpointInfo, CheckpointSchedule, load_checkpoint, read_info, save_checkpoint
from finlora.train.loop import AnswerLoss, Progress, count_steps, run_steps
from finlora.train.optimizer import is_synchronised, make_optimizer
from finlora.train.run import RunFolder, append_progress, hash_run, load_training_set, open_run
from finlora.train.sampler import Sampler
from finlora.train.summary import export_adapter, summarise_run
from finlora.train.wire import Wire, WireClock, WireMeter


def run_training(config: RunConfig) -> Result:
    """Train an adapter on the cluster that this process is connected to, or resume the run of that name.

    Args:
        config: with absolute paths (`resolve_paths`). Data, base files and the cluster's size are checked before any
            worker starts.

    Returns:
        What the run brought, which is also appended to results.jsonl of its folder. The adapter is in NAME/adapter.

    Raises:
        FinloraError: as its kinds say; the error of a worker is raised here as it was raised there.
    """
    train = config.train
    gpus = train.gpus_per_worker if train.device == "cuda" else 0.0
    cluster.require(train.num_workers, train.cpus_per_worker, gpus)
    training_set = load_training_set(config)
    folder = open_run(config)
    started = time.time()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": config_to_tree(config), "folder": str(folder.root)},
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.device == "cuda",
            resources_per_worker={"CPU": train.cpus_per_worker} | ({"GPU": gpus} if gpus else {}),
        ),
        torch_config=TorchConfig(backend=_collectives(config)),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.output_dir,
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
        ),
    )
    try:
        outcome = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _own_error(error) from error
    result = summarise_run(config, folder, training_set, time.time() - started, outcome.metrics or {})
    append_result(folder.results, result)
    return result


def _work(loop_config: dict[str, Any]) -> None:
    """Body of one Ray Train worker."""
    config = config_from_tree(loop_config["config"])
    folder = RunFolder(Path(loop_config["folder"]))
    context = ray.train.get_context()
    worker, world_size = context.get_world_rank(), context.get_world_size()
    device = _choose_device(config)
    training_set = load_training_set(config)
    sampler = Sampler(
        num_examples=len(training_set.encoded),
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        world_size=world_size,
        seed=config.seed,
    )
    total_steps = count_steps(sampler, config.train.epochs, config.train.max_steps)
    with quiet_bitsandbytes():
        base = load_base(config.model, config.model.bits, device, config.seed)
        model = attach_lora(base.model, config.lora, config.model.base, config.seed)
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = trainable_parameters(model)
        meter = WireMeter(WireClock(device), sum(p.numel() for p in parameters.values()), world_size)
        optimizer = make_optimizer(list(parameters.values()), config.optim, total_steps, meter.clock)
        engine = _make_engine(AnswerLoss(model.train()), optimizer, config, sampler)
        meter.watch(engine)
        info = CheckpointInfo(step=0, world_size=world_size, run_hash=hash_run(config, training_set.hashes))
        start_step = 0
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as path:
                start_step = read_info(Path(path), info.run_hash, world_size).step
                meter.resume(load_checkpoint(Path(path), worker, parameters, optimizer))
        record = _Recorder(config, folder, worker, lambda: meter.read(optimizer))
        schedule = CheckpointSchedule(
            steps_per_epoch=sampler.steps_per_epoch,
            total_steps=total_steps,
            every_steps=config.train.checkpoint_every_steps,
        )

        def save(step: int) -> None:
            if not schedule.is_due(step, is_synchronised=is_synchronised(optimizer)):
                return
            with tempfile.TemporaryDirectory(prefix="finlora-checkpoint-") as path:
                here = dataclasses.replace(info, step=step)
                state = optimizer.state_dict()
                save_checkpoint(Path(path), worker, here, parameters, state, meter.read(optimizer))
                ray.train.report(record.metrics, checkpoint=ray.train.Checkpoint.from_directory(path))

        run_steps(
            engine,
            training_set.encoded,
            sampler,
            config.optim,
            worker=worker,
            start_step=start_step,
            total_steps=total_steps,
            pad_token_id=base.tokenizer.pad_token_id,
            device=device,
            log_every_steps=config.train.log_every_steps,
            reduce_sum=_reduce_sum,
            on_log=record,
            on_step_end=save,
        )
        record.close()
        if worker == 0:
            export_adapter(config, folder, base, model, training_set)


def _choose_device(config: RunConfig) -> torch.device:
    """Pick this worker's device and tell DeepSpeed, which reads LOCAL_RANK and DS_ACCELERATOR at import."""
    if config.train.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    os.environ["LOCAL_RANK"] = str(device.index)  # workers that share a GPU see one device, whatever their local rank
    torch.cuda.set_device(device)
    return device


def _collectives(config: RunConfig) -> str:
    # NCCL refuses two ranks on one GPU, so workers that share a GPU talk over gloo.
    return "nccl" if config.train.device == "cuda" and config.train.gpus_per_worker >= 1 else "gloo"


def _make_engine(module: AnswerLoss, optimizer: torch.optim.Optimizer, config: RunConfig, sampler: Sampler) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile its shared-memory collective with g++ (30 s); gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=_collectives(config), verbose=False)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        dist_init_required=False,
        config={
            "train_batch_size": config.train.global_batch_size,
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": sampler.num_micro_batches,
            # The loop says when a step is due: the last batch of an epoch may have fewer micro-batches.
            "managed_gradient_accumulation": False,
            "zero_optimization": {"stage": 0},
            "torch_autocast": {"enabled": config.train.precision == "bf16", "dtype": "bfloat16"},
            "gradient_clipping": config.optim.max_grad_norm,
            "steps_per_print": None,
        },
    )
    # 0/1 Adam communicates by itself, compressed.
    engine.enable_backward_allreduce = config.optim.name == "adamw"
    return engine


def _reduce_sum(values: torch.Tensor) -> torch.Tensor:
    torch.distributed.all_reduce(values)
    return values


class _Recorder:
    """Sends each Progress to the run folder and TensorBoard (worker 0) and to Ray's metrics (all workers)."""

    def __init__(self, config: RunConfig, folder: RunFolder, worker: int, read_wire: Callable[[], Wire]) -> None:
        from ray.util.metrics import Gauge

        self.folder, self.worker, self.read_wire = folder, worker, read_wire
        self.num_workers = config.train.num_workers
        self.metrics: dict[str, Any] = {}
        tags = {"run": config.name, "worker": str(worker)}
        names = ("loss", "learning_rate", "tokens_per_second", "examples_per_second", "memory_gib", "step")
        self.gauges = {name: Gauge(f"finlora_train_{name}", tag_keys=("run", "worker")) for name in names}
        for gauge in self.gauges.values():
            gauge.set_default_tags(tags)
        self.writer: Any = None
        if worker == 0:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(folder.root / "tensorboard"))

    def __call__(self, progress: Progress) -> None:
        values = dataclasses.asdict(progress)
        wire = dataclasses.asdict(self.read_wire())
        shared = torch.zeros(self.num_workers, 1 + len(wire), dtype=torch.float64)
        shared[self.worker] = torch.tensor([progress.memory_gib, *wire.values()], dtype=torch.float64)
        if torch.distributed.get_backend() == "nccl":
            shared = shared.cuda()
        memory, *columns = _reduce_sum(shared).T.tolist()
        self.metrics = values | {
            "memory_gib": sum(memory),
            "wire": [dict(zip(wire, row, strict=True)) for row in zip(*columns, strict=True)],
        }
        for name, gauge in self.gauges.items():
            gauge.set(values[name])
        if self.worker == 0:
            append_progress(self.folder, dataclasses.replace(progress, memory_gib=self.metrics["memory_gib"]))
            for name in self.gauges:
                self.writer.add_scalar(f"train/{name}", self.metrics[name], progress.step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def _own_error(error: Exception) -> Exception:
    """Return the first FinloraError of the workers, or the error itself when none of ours caused it."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in [*failures.values(), error.__cause__]:
        cause = getattr(failure, "cause", None) or failure
        if isinstance(cause, FinloraError):
            return cause
    return error
