"""The training loop in its own process, without Ray: interrupted at random times and restarted until it is done.

Sampler, packing, AdamW, checkpoints and their list, progress log and adapter folder are the product's own. Losses and
weights must equal those of an undisturbed loop, bit for bit.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch

from finlora.config import RunConfig
from finlora.errors import FinloraError
from finlora.train.run.run_folder import RunFolder
from tests.chaos.files import CPU, World
from tests.chaos.record import Injection, plain

_LIMIT_S = 120.0
_KEEP = 2


class _Plain:
    """DeepSpeed engine interface of the loop, for one worker."""

    def __init__(self, module: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def __call__(self, batch: Any) -> torch.Tensor:
        return self.module(batch)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def train(config: RunConfig, spoil_at: int | None = None, jump_seed: int | None = None) -> None:
    """Train a run, or resume it from its last checkpoint.

    Args:
        spoil_at: step after which one weight becomes NaN.
        jump_seed: seed of a clock that jumps back and forward by up to a day.
    """
    from finlora.model.base import load_base
    from finlora.model.lora import attach_lora, trainable_parameters
    from finlora.optim.optimizer import make_optimizer
    from finlora.optim.traffic import Wire, WireClock
    from finlora.train.path import make_sampler, plan_path, take_path
    from finlora.train.run.checkpoint import (
        CheckpointInfo,
        CheckpointSchedule,
        load_checkpoint,
        read_info,
        require_finite,
        save_checkpoint,
    )
    from finlora.train.run.progress import append_progress
    from finlora.train.run.run_folder import hash_run, load_training_set, open_run
    from finlora.train.run.snapshot import repair_snapshot
    from finlora.train.run.summary import export_adapter
    from finlora.train.steps.loop import count_steps, run_steps

    if jump_seed is not None:
        _set_clock_at_random(jump_seed)
    torch.set_num_threads(1)
    folder, training_set = open_run(config), load_training_set(config)
    repair_snapshot(folder.root)
    examples = training_set.encoded
    sampler = make_sampler(config, examples)
    total = count_steps(sampler, config.train.epochs, config.train.max_steps)
    base = load_base(config.model, 16, CPU, config.seed, files=training_set.base)
    model = attach_lora(base.model, config.lora, config.model.base, config.seed)
    plan = plan_path(config, training_set.base.shape, examples, 4.0)
    taken = take_path(model.train(), config, examples, plan, CPU, base.tokenizer.pad_token_id)
    parameters = trainable_parameters(model)
    optimizer = make_optimizer(list(parameters.values()), config.optim, total, WireClock(CPU))
    info = CheckpointInfo(step=0, world_size=1, run_hash=hash_run(config, training_set.hashes))
    whole = sorted(folder.root.glob("checkpoint_[0-9]*"), key=lambda path: read_info(path, info.run_hash, 1).step)
    start = 0
    if whole:
        start = read_info(whole[-1], info.run_hash, 1).step
        load_checkpoint(whole[-1], 0, parameters, optimizer)
    schedule = CheckpointSchedule(
        steps_per_epoch=sampler.steps_per_epoch, total_steps=total, every_steps=config.train.checkpoint_every_steps
    )

    def end_step(step: int) -> bool:
        if step == spoil_at:
            with torch.no_grad():
                next(iter(parameters.values())).view(-1)[0] = float("nan")
        if schedule.is_due(step, is_synchronised=True):
            require_finite(parameters, step)
            path = folder.root / f"checkpoint_{time.time():020.6f}"
            save_checkpoint(path, 0, dataclasses.replace(info, step=step), parameters, optimizer.state_dict(), Wire())
            kept.append(path)
            while len(kept) > _KEEP:
                shutil.rmtree(kept.pop(0))
        return False

    kept = list(whole)
    run_steps(
        _Plain(taken.module, optimizer),
        examples,
        sampler,
        config.optim,
        worker=0,
        start_step=start,
        total_steps=total,
        batches=taken.batches,
        device=CPU,
        log_every_steps=config.train.log_every_steps,
        reduce_sum=lambda tensor: tensor,
        on_log=lambda progress: append_progress(folder, progress),
        on_step_end=end_step,
    )
    export_adapter(config, folder, base, model, training_set)


def break_loop(kind: str, world: World, seed: int) -> Injection:
    """Interrupt a run at a random time, resume it, and compare it with the undisturbed run."""
    rng = random.Random(seed)
    quiet, config = (dataclasses.replace(world.config, name=name) for name in ("quiet", f"run-{seed}"))
    if not _folder(quiet).adapter.exists():
        _finish(quiet)
    seen, recovery, lost = "", None, ""
    try:
        if kind == "weight becomes NaN":
            seen = _spoil(config, rng)
        elif kind == "clock set back or forward":
            _finish(config, jump_seed=seed)
            seen = "nothing"
        else:
            seen, recovery = _interrupt(kind, config, rng)
        _finish(config)
        lost = _compare(quiet, config)
    except (TimeoutError, RuntimeError) as error:
        lost = str(error)
    shutil.rmtree(_folder(config).root, ignore_errors=True)
    return Injection(kind, "training loop", seed, seen, lost, recovery)


def _interrupt(kind: str, config: RunConfig, rng: random.Random) -> tuple[str, float]:
    process = _start(config)
    after, folder = rng.randrange(1, 20), _folder(config)
    until = time.monotonic() + _LIMIT_S
    while len(_lines(folder)) < after and process.is_alive():
        if time.monotonic() > until:
            raise TimeoutError(f"the loop did not reach step {after} in {_LIMIT_S:.0f} s")
        time.sleep(0.002)
    assert process.pid is not None
    if kind == "killed":
        os.kill(process.pid, signal.SIGKILL)
        seen = "the same command resumes from the last checkpoint"
    elif kind == "out of memory":
        # No more memory from now on: the next allocation that grows the process fails.
        resource.prlimit(process.pid, resource.RLIMIT_AS, (2**20, 2**20))
        seen = "a torch or Python error, or nothing where no more memory was needed; the same command resumes"
    else:
        for _ in range(3):
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(rng.uniform(0, 0.2))
            os.kill(process.pid, signal.SIGCONT)
        seen = "nothing"
    started = time.monotonic()
    process.join(_LIMIT_S)
    if process.is_alive():
        process.kill()
        raise TimeoutError(f"the loop hung for {_LIMIT_S:.0f} s after the fault")
    before = len(_lines(folder))
    if process.exitcode == 0:
        return seen, time.monotonic() - started
    process = _start(config)
    while len(_lines(folder)) <= before and process.is_alive():
        time.sleep(0.002)
    seconds = time.monotonic() - started
    process.join(_LIMIT_S)
    return seen, seconds


def _spoil(config: RunConfig, rng: random.Random) -> str:
    """Set a weight to NaN: the run must end with an error of ours, and no checkpoint may contain NaN."""
    from safetensors.torch import load_file

    log_every = rng.choice((1, 7))  # a checkpoint is due every 3 steps, whether or not the loss is logged
    spoilt = dataclasses.replace(config, train=dataclasses.replace(config.train, log_every_steps=log_every))
    process = _start(spoilt, spoil_at=rng.randrange(1, 22))
    process.join(_LIMIT_S)
    if process.exitcode != 3:
        raise RuntimeError(f"the loop exited with {process.exitcode} after a NaN, expected 3 (FinLoRA's own error)")
    said = (_folder(config).root / "error.txt").read_text(encoding="utf-8")
    for path in _folder(config).root.glob("checkpoint_*/adapter.safetensors"):
        if not all(tensor.isfinite().all() for tensor in load_file(path).values()):
            raise RuntimeError(f"{path} contains NaN")
    _folder(config).progress.unlink(missing_ok=True)  # its logged steps differ from those of the undisturbed run
    for path in _folder(config).root.glob("checkpoint_[0-9]*"):
        shutil.rmtree(path)
    return plain(said)


def _compare(quiet: RunConfig, config: RunConfig) -> str:
    from finlora.train.run.progress import read_progress

    losses = [[(record.step, record.loss) for record in read_progress(_folder(each))] for each in (quiet, config)]
    weights = [(_folder(each).adapter / "adapter_model.safetensors").read_bytes() for each in (quiet, config)]
    left = [path.name for path in _folder(config).root.glob(".*")]
    if losses[0] != losses[1]:
        return f"losses {losses[1]} instead of {losses[0]}"
    if weights[0] != weights[1]:
        return "the adapter differs from the undisturbed run's"
    return f"left behind: {left}" if left else ""


def _finish(config: RunConfig, **options: Any) -> None:
    process = _start(config, **options)
    process.join(_LIMIT_S)
    if process.exitcode != 0:
        process.kill()
        raise RuntimeError(f"the loop exited with {process.exitcode}, expected it to reach its last step")


def _start(config: RunConfig, **options: Any) -> Any:
    process = multiprocessing.get_context("fork").Process(target=_train_in_child, args=(config,), kwargs=options)
    process.start()
    return process


def _train_in_child(config: RunConfig, **options: Any) -> None:
    try:
        train(config, **options)
    except FinloraError as error:
        (_folder(config).root / "error.txt").write_text(str(error), encoding="utf-8")
        os._exit(3)


def _folder(config: RunConfig) -> RunFolder:
    return RunFolder(Path(config.output_dir) / config.name)


def _lines(folder: RunFolder) -> list[bytes]:
    return folder.progress.read_bytes().splitlines() if folder.progress.exists() else []


def _set_clock_at_random(seed: int) -> None:
    """Patch time.time() in this process: it jumps by up to a day in both directions."""
    rng, real = random.Random(seed), time.time
    offset = 0.0

    def jumping() -> float:
        nonlocal offset
        if rng.random() < 0.5:
            offset = rng.uniform(-86_400, 86_400)
        return real() + offset

    time.time = jumping
