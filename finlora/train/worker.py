"""Data-parallel QLoRA under Ray Train v2: each worker holds a copy of the base and a DeepSpeed engine at ZeRO stage 0.

The base is frozen and quantised, so there is nothing for ZeRO to shard; DeepSpeed brings bf16 autocast, gradient
reduction and clipping. Adapter and optimiser state are float32.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from pathlib import Path
from typing import Any, Literal

import ray
import ray.train
import torch
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from finlora.cluster import connect
from finlora.config import RunConfig
from finlora.configfile import config_from_tree, config_to_tree
from finlora.durable import scratch_folder
from finlora.machine.cpu import set_environment
from finlora.machine.start_clock import StartClock, name_first
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.base_files import BaseFiles
from finlora.model.lora import trainable_parameters
from finlora.optim.optimizer import is_synchronised, make_optimizer
from finlora.optim.traffic import WireClock, WireMeter
from finlora.precision import describe_choice, resolve_training
from finlora.results import Result, append_result
from finlora.train.data_parallel import choose_collectives, make_engine
from finlora.train.held_out import HELD_OUT, HeldOut
from finlora.train.path import make_sampler, take_path
from finlora.train.plan import Verdict, count_gpus, explain_out_of_memory, find_memory_gib, plan_run
from finlora.train.run.adapter_start import attach_adapter
from finlora.train.run.attempts import AttemptClock
from finlora.train.run.checkpoint import (
    CheckpointInfo,
    CheckpointSchedule,
    load_checkpoint,
    read_info,
    require_finite,
    save_checkpoint,
)
from finlora.train.run.failure import GiveUp, own_error
from finlora.train.run.progress import StepMark, clear_step, read_step
from finlora.train.run.recorder import PUBLISHED, Recorder, reduce_sum
from finlora.train.run.run_folder import (
    RunFolder,
    TrainingSet,
    claim_run,
    describe_date,
    explain_full_disk,
    hash_run,
    load_training_set,
    open_run,
)
from finlora.train.run.snapshot import repair_snapshot
from finlora.train.run.stall import StallGuard
from finlora.train.run.start_note import FIRST_STEP, StartWatch, clear_note, write_note
from finlora.train.run.stop import StopRequest, describe_stop, stop_on_signals
from finlora.train.run.summary import export_adapter, summarise_run
from finlora.train.run.wait_for_gpus import AwaitRoom, WaitingWords
from finlora.train.steps.loop import count_steps, run_steps
from finlora.train.tracking.following import track_training

_logger = logging.getLogger(__name__)


def run_training(
    config: RunConfig,
    announce: Callable[[str], None] = _logger.warning,
    *,
    base: BaseFiles | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
    holds_out: bool = False,
    start: StartClock | None = None,
) -> Result:
    """Train an adapter on the cluster that this process is connected to, or resume the run of that name.

    Args:
        config: with absolute paths (`resolve_paths`). Data, base files and the cluster's size are checked before any
            worker starts.
        announce: shows a line to the user.
        base: files of the config's base, if this process has found and checked them already. None: it does so here. Each
            worker does it again.
        callbacks: called at each checkpoint.
        holds_out: also measure the loss on a search's held-out examples at each checkpoint (finlora/train/held_out.py).
        start: of the command, whose phases are announced after the first step. None: its own, of which nothing is said.

    Returns:
        The numbers of the run, which are also appended to results.jsonl in its folder. The adapter is in NAME/adapter.

    Raises:
        StoppedError: a signal came, and the workers stopped at a checkpoint or before their first step.
        FinloraError: of any kind; the error of a worker is raised here unchanged.
    """
    asked, config = config, resolve_training(config, RunFolder(Path(config.output_dir) / config.name).config)
    if said := describe_choice(asked, config):
        announce(said)
    train = config.train
    gpus = train.gpus_per_worker if train.device == "cuda" else 0.0
    connect.require(train.num_workers, train.cpus_per_worker, gpus)
    training_set = load_training_set(config, base)
    folder = open_run(config)
    if said := describe_date(training_set):
        announce(said)
    with claim_run(folder), stop_on_signals(folder.stop, announce, lambda: read_step(folder) is not None):
        clear_step(folder)
        clear_note(folder)
        for line in repair_snapshot(folder.root):
            announce(line)
        clock = AttemptClock(folder)
        clock.save()  # trackers read the start of the run from it
        with track_training(config, folder, announce):
            try:
                trainer = _make_trainer(config, folder, callbacks, holds_out)
                watch = StartWatch(folder, start, announce)
                outcome = _fit(trainer, WaitingWords(folder.waiting, announce), clock, watch)
            except ray.train.TrainingFailedError as error:
                raise own_error(error, folder) from error
            step, total_steps = outcome.return_value
            if step < total_steps:
                raise describe_stop(folder.stop, step, total_steps)
            result = summarise_run(config, folder, training_set, clock.list(), outcome.metrics or {}, watch.seconds)
            append_result(folder.results, result)
    return result


def _make_trainer(
    config: RunConfig, folder: RunFolder, callbacks: Sequence[ray.train.UserCallback], holds_out: bool
) -> TorchTrainer:
    train = config.train
    gpus = {"GPU": train.gpus_per_worker} if train.device == "cuda" else {}
    bundle = {"CPU": train.cpus_per_worker} | gpus
    return TorchTrainer(
        _work,
        train_loop_config={"config": config_to_tree(config), "folder": str(folder.root), "holds_out": holds_out},
        scaling_config=ScalingConfig(
            num_workers=train.num_workers, use_gpu=train.device == "cuda", resources_per_worker=bundle
        ),
        torch_config=TorchConfig(backend=choose_collectives(config)),
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=config.output_dir,
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=train.keep_checkpoints),
            callbacks=[*callbacks, GiveUp(), AwaitRoom(folder, [bundle] * train.num_workers, config.max_wait_s)],
        ),
    )


def _fit(trainer: TorchTrainer, words: WaitingWords, clock: AttemptClock, watch: StartWatch) -> ray.train.Result:
    """Run the trainer in its own thread: in the main thread it would handle Ctrl-C itself and kill the workers."""
    future: futures.Future[ray.train.Result] = futures.Future()

    def fit() -> None:
        try:
            future.set_result(trainer.fit())
        except BaseException as error:
            future.set_exception(error)

    # A daemon, so that a second Ctrl-C does not wait for it.
    threading.Thread(target=fit, daemon=True).start()
    try:
        while not futures.wait([future], timeout=1.0).done:
            words.show_new()
            clock.tick(is_waiting=words.is_waiting)
            watch.look(clock.list()[-1].waited)
        words.show_new()
        return future.result()
    finally:
        clock.tick(is_waiting=words.is_waiting)
        clock.save()
        watch.look(clock.list()[-1].waited)


def _work(loop_config: dict[str, Any]) -> tuple[int, int]:
    """Body of one Ray Train worker; returns the steps done and the steps of the whole run."""
    config = config_from_tree(loop_config["config"])
    folder = RunFolder(Path(loop_config["folder"]))

    def note(phase: str | None) -> None:
        if ray.train.get_context().get_world_rank() == 0:
            write_note(folder, clock, phase)

    clock = StartClock("data", on_phase=note)
    note("data")
    device = _choose_device(config)
    training_set = load_training_set(config)
    verdict = plan_run(config, find_memory_gib(device), count_gpus(config), training_set)
    verdict.require_fit()
    try:
        return _train(config, folder, device, training_set, verdict, loop_config["holds_out"], clock)
    except torch.cuda.OutOfMemoryError as error:
        raise explain_out_of_memory(config, str(error), verdict.packs) from error
    except Exception as error:
        if said := explain_full_disk(error, folder):
            raise said from error
        raise


def _train(
    config: RunConfig,
    folder: RunFolder,
    device: torch.device,
    training_set: TrainingSet,
    verdict: Verdict,
    holds_out: bool,
    clock: StartClock,
) -> tuple[int, int]:
    """Load the base, attach the adapter, resume from the newest checkpoint, train, export the adapter."""
    context = ray.train.get_context()
    worker, world_size = context.get_world_rank(), context.get_world_size()
    examples = training_set.encoded
    sampler = make_sampler(config, examples)
    total_steps = count_steps(sampler, config.train.epochs, config.train.max_steps)
    if worker == 0:  # before the base is loaded, which is where memory can run out
        _write_plan(folder, "w", verdict.describe(config), describe_date(training_set))
    clock.enter("base")
    with quiet_bitsandbytes():
        base = load_base(config.model, config.model.bits, device, config.seed, files=training_set.base)
        if worker == 0:
            _write_plan(folder, "a", base.describe_loading())
        clock.enter("adapter")
        run_hash = hash_run(config, training_set.name_inputs(base.weights_hash))
        model, start = attach_adapter(base.model, config, folder, run_hash, worker)
        path = take_path(model.train(), config, examples, verdict.packs, device, base.tokenizer.pad_token_id)
        parameters = trainable_parameters(model)
        meter = WireMeter(WireClock(device), sum(p.numel() for p in parameters.values()), world_size)
        optimizer = make_optimizer(parameters, config.optim, total_steps, meter.clock)
        engine = make_engine(path.module, optimizer, config)
        meter.watch(engine)
        state = _TrainedState(worker, world_size, run_hash, parameters, optimizer, meter)
        start_step = state.resume()
        record = Recorder(folder, worker, world_size, lambda: meter.read(optimizer), _make_gauges(config, worker))
        held_out = HeldOut(config, training_set.base, folder, worker, world_size, reduce_sum) if holds_out else None
        stop = StopRequest(folder.stop, worker, world_size)
        if stop.is_asked():
            return start_step, total_steps
        with StallGuard(config.train.max_stall_s) as guard:
            after_step = _AfterStep(
                state=state,
                schedule=CheckpointSchedule(
                    steps_per_epoch=sampler.steps_per_epoch,
                    total_steps=total_steps,
                    every_steps=config.train.checkpoint_every_steps,
                ),
                record=record,
                measure=None if held_out is None else lambda step: held_out.measure(step, model, device),
                stop=stop,
                guard=guard,
                mark=StepMark(folder, total_steps) if worker == 0 else None,
                clock=clock,
            )
            clock.enter(name_first(FIRST_STEP, config.train.device))
            done = run_steps(
                engine,
                examples,
                sampler,
                config.optim,
                worker=worker,
                start_step=start_step,
                total_steps=total_steps,
                batches=path.batches,
                device=device,
                log_every_steps=config.train.log_every_steps,
                reduce_sum=reduce_sum,
                on_log=record,
                on_step_end=after_step,
                on_pass=guard.tick,
            )
        if worker == 0 and done == total_steps:
            export_adapter(config, folder, base, model, training_set, start)
    return done, total_steps


class _TrainedState:
    """What a worker's checkpoint holds: its adapter parameters, optimiser state and traffic counts.

    Args:
        run_hash: of the settings and inputs; a checkpoint with another one is refused.
    """

    def __init__(
        self,
        worker: int,
        world_size: int,
        run_hash: str,
        parameters: dict[str, torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        meter: WireMeter,
    ) -> None:
        self._worker, self._world_size, self._run_hash = worker, world_size, run_hash
        self._parameters, self._optimizer, self._meter = parameters, optimizer, meter

    @property
    def is_synchronised(self) -> bool:
        """Whether all workers hold the same weights now."""
        return is_synchronised(self._optimizer)

    def require_finite(self, step: int) -> None:
        """Refuse to go on with NaN or infinity in the adapter."""
        require_finite(self._parameters, step)

    def resume(self) -> int:
        """Restore the newest checkpoint; returns its step, or 0 if there is none."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as path:
            step = read_info(Path(path), self._run_hash, self._world_size).step
            self._meter.resume(load_checkpoint(Path(path), self._worker, self._parameters, self._optimizer))
        return step

    def report(self, step: int, metrics: dict[str, Any]) -> None:
        """Write this worker's part of a checkpoint and hand it to Ray Train. Collective: all workers must call it."""
        info = CheckpointInfo(step=step, world_size=self._world_size, run_hash=self._run_hash)
        # Most workers are killed while they write; the next one on the node removes their scratch folders.
        with scratch_folder(Path(tempfile.gettempdir()), "finlora-checkpoint-") as path:
            wire = self._meter.read(self._optimizer)
            save_checkpoint(path, self._worker, info, self._parameters, self._optimizer.state_dict(), wire)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(path))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _AfterStep:
    """End of each step, on every worker: writes a checkpoint where one is due or a stop is asked for; says whether to stop."""

    state: _TrainedState
    schedule: CheckpointSchedule
    record: Recorder
    measure: Callable[[int], float] | None
    """Returns the loss on a search's held-out examples. None: the run is not a trial."""
    stop: StopRequest
    guard: StallGuard
    mark: StepMark | None
    """None: another worker writes it."""
    clock: StartClock
    """Of this worker's start, which the first step ends."""

    def __call__(self, step: int) -> bool:
        if not self.clock.is_ended:
            self.clock.end()
            if self.mark is not None:
                write_note(self.mark.folder, self.clock, None)
        is_agreed = self.state.is_synchronised
        is_due = self.schedule.is_due(step, is_synchronised=is_agreed)
        is_stop = is_agreed and step < self.schedule.total_steps and self.stop.is_asked()
        if is_due or is_stop:
            self._save(step)
        self.guard.tick()
        if self.mark is not None:
            self.mark.tick(step)
        return is_stop

    def _save(self, step: int) -> None:
        self.state.require_finite(step)
        metrics = {**self.record.metrics, "step": step}
        if self.measure is not None:
            metrics[HELD_OUT] = self.measure(step)
        self.state.report(step, metrics)


def _write_plan(folder: RunFolder, mode: Literal["w", "a"], *lines: str) -> None:
    with folder.plan.open(mode, encoding="utf-8") as plan:
        plan.writelines(f"{line}\n" for line in lines if line)


def _choose_device(config: RunConfig) -> torch.device:
    """Return this worker's device, and set LOCAL_RANK or DS_ACCELERATOR, which DeepSpeed reads at import."""
    if config.train.device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
        set_environment()
        return torch.device("cpu")
    device: torch.device = ray.train.torch.get_device()
    os.environ["LOCAL_RANK"] = str(device.index)  # workers that share a GPU see one device, whatever their local rank
    torch.cuda.set_device(device)
    return device


def _make_gauges(config: RunConfig, worker: int) -> Callable[[dict[str, float]], None]:
    """Return a function that sets this worker's numbers in Ray's metrics."""
    from ray.util.metrics import Gauge

    gauges = {name: Gauge(f"finlora_train_{name}", text, ("run", "worker")) for name, text in PUBLISHED.items()}

    def publish(values: dict[str, float]) -> None:
        for name, value in values.items():
            gauges[name].set(value, tags={"run": config.name, "worker": str(worker)})

    return publish
