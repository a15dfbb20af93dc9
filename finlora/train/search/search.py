"""Search over rank, bits, learning rate and more, on Ray Tune: each trial is a Ray Train run with its own workers.

A trial is a small Ray Tune driver that runs the training (Ray Train, finlora/train/worker.py), then scores the adapter on the
held-out examples. At each checkpoint the workers measure the loss on these examples, and ASHA stops the trials with the higher
losses (Li et al. 2018, arXiv:1810.05934).

Ray Tune loses ASHA's rungs in a restart, and learns of a trial's end only when it next writes its state. Therefore the records
in the trials' own folders decide: a restarted search skips the trials that have ended, reports their losses to ASHA, and
resumes the others from their last checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import ray
from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from finlora.cluster import connect
from finlora.cluster.lease import Bundle, Patience, wait_for_room
from finlora.config import RunConfig
from finlora.configfile import config_to_tree
from finlora.errors import FinloraError, NoRoomError, StoppedError, counted
from finlora.model.base_files import BaseFiles
from finlora.precision import describe_choice, resolve_training
from finlora.train.path import make_sampler
from finlora.train.run.progress import read_step
from finlora.train.run.run_folder import RunFolder, claim_run, load_training_set
from finlora.train.run.stop import describe_stop, stop_on_signals
from finlora.train.run.wait_for_gpus import free_group
from finlora.train.search.asha import Listener, ResumedAsha, StopWhenIdle
from finlora.train.search.run_trial import TrialTask, drive_trial
from finlora.train.search.search_folder import (
    RECORD,
    Mark,
    SearchFolder,
    TrialRecord,
    TrialState,
    count_grace_steps,
    open_search,
    read_record,
    search_folder,
    trial_config,
)
from finlora.train.search.space import SearchConfig, Trial, sample_trials
from finlora.train.search.track_search import track_search
from finlora.train.steps.loop import count_steps

_logger = logging.getLogger(__name__)

_CLOSE_S = 20.0
"""Longest wait for the processes of the last pruned trials to end."""
_DRIVER_CPUS = 0.05
"""CPUs of a trial's driver, which only waits; Ray Tune refuses 0."""


def run_search(
    config: RunConfig,
    search: SearchConfig,
    announce: Callable[[str], None] = _logger.warning,
    on_record: Callable[[TrialRecord], None] = lambda _record: None,
    base: BaseFiles | None = None,
) -> list[TrialRecord]:
    """Run the trials of a search that have not ended yet, on the cluster that this process is connected to.

    Args:
        config: with absolute paths (`resolve_paths`). Data, base and cluster are checked before any trial starts.
        announce: shows the user a line.
        on_record: called with each trial as it ends.
        base: files of the config's base, if this process has found and checked them already. None: it does so here. Each
            trial does it again.

    Returns:
        The record of each trial, in the trials' order.

    Raises:
        StoppedError: a signal came; the running trials stopped at checkpoints or before their first steps.
        NoRoomError: others hold the GPUs or cores; says who.
        FinloraError: of any kind. A failing trial raises nothing; its record holds the cause.
    """
    asked, config = config, resolve_training(config, search_folder(config).config)
    if said := describe_choice(asked, config):
        announce(said)
    trials = sample_trials(config, search)
    bundles = _bundles(config)
    connect.require(config.train.num_workers, bundles[0]["CPU"], bundles[0].get("GPU", 0.0))
    folder = open_search(config, search)
    records = {trial.name: read_record(folder, trial) for trial in trials}
    if search.retry_failed:
        records = {name: record for name, record in records.items() if record and record.state != TrialState.FAILED}
    done = [record for record in records.values() if record is not None]
    to_do = [trial for trial in trials if records.get(trial.name) is None]
    if done:
        announce(f"{len(done)} of {len(trials)} trials have ended already: {len(to_do)} to go.")

    def has_begun() -> bool:
        return any(read_step(folder.run_of(trial)) is not None for trial in to_do)

    with claim_run(RunFolder(folder.root)), stop_on_signals(folder.stop, announce, has_begun):
        if to_do:
            wait_for_room(bundles, Patience(config.max_wait_s, announce), lambda: _raise_when_stopped(folder, 0, 0))
            with track_search(config, search, folder, announce):
                _run_trials(config, search, folder, to_do, done, announce, on_record, base)
                return _collect(folder, trials)
        return _collect(folder, trials)


def _collect(folder: SearchFolder, trials: Sequence[Trial]) -> list[TrialRecord]:
    """Return the record of each trial, or raise why one has none."""
    found = [record for trial in trials if (record := read_record(folder, trial)) is not None]
    if len(found) < len(trials):
        _raise_when_stopped(folder, len(found), len(trials))
        raise NoRoomError(_explain_unplaced(folder, trials))
    return found


def _run_trials(
    config: RunConfig,
    search: SearchConfig,
    folder: SearchFolder,
    to_do: Sequence[Trial],
    done: Sequence[TrialRecord],
    announce: Callable[[str], None],
    on_record: Callable[[TrialRecord], None],
    base: BaseFiles | None,
) -> None:
    own = trial_config(config, search, folder, to_do[0], 1)
    total_steps = _count_steps(own, base)
    grace = count_grace_steps(search, total_steps)
    for trial in to_do:
        run = folder.run_of(trial)
        for name in (*Mark, "stop", "step", RECORD):  # of a search that was killed, or of a failure
            (run.root / name).unlink(missing_ok=True)
    tasks = {
        trial.name: TrialTask(
            config=config_to_tree(trial_config(config, search, folder, trial, grace)),
            search=str(folder.root),
            trial=trial,
            total_steps=total_steps,
        )
        for trial in to_do
    }
    at_once = search.max_concurrent or _count_concurrent(config)
    rungs = [grace * search.reduction_factor**k for k in range(20)] if search.reduction_factor > 1 else []
    announce(
        f"{counted(len(to_do), 'trial')} of {counted(total_steps, 'step')}, at most {at_once} at once; ASHA looks after steps "
        f"{', '.join(str(rung) for rung in rungs if rung < total_steps) or 'none'}."
    )
    logging.getLogger("ray.tune").setLevel(
        logging.ERROR
    )  # it warns of each trial that was stopped before its first report
    # Ray Tune would also write TensorBoard events and tables, which the trials' folders hold already, and warn of some values.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(drive_trial, tasks=tasks), {"cpu": _DRIVER_CPUS}),
        # The name alone: with a second key Ray Tune (2.60) refuses a trial that ends before its first report.
        param_space={"trial": tune.grid_search([trial.name for trial in to_do])},
        tune_config=tune.TuneConfig(
            scheduler=_choose_scheduler(folder, search, total_steps, grace, done),
            max_concurrent_trials=at_once,
            trial_dirname_creator=lambda trial: str(trial.config["trial"]),
            trial_name_creator=lambda trial: str(trial.config["trial"]),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder.root),
            stop=StopWhenIdle(folder),
            # Restarts drivers that crash, as with their node. A trial that fails records it and returns.
            failure_config=tune.FailureConfig(max_failures=config.train.max_failures),
            callbacks=[Listener(folder, tasks, on_record), JsonLoggerCallback()],
            verbose=0,
        ),
    )
    _fit(tuner, folder, to_do)


def _choose_scheduler(
    folder: SearchFolder, search: SearchConfig, total_steps: int, grace: int, done: Sequence[TrialRecord]
) -> TrialScheduler:
    if search.reduction_factor == 1:
        return FIFOScheduler()
    return ResumedAsha(folder, search.reduction_factor, total_steps, grace, done)


def _fit(tuner: tune.Tuner, folder: SearchFolder, trials: Sequence[Trial]) -> None:
    """Run the tuner in its own thread: in the main thread it would handle Ctrl-C itself.

    Meanwhile pass a stop on to the trials, and free the GPUs and cores of pruned trials.
    """
    future: futures.Future[Any] = futures.Future()

    def fit() -> None:
        try:
            future.set_result(tuner.fit())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=fit, daemon=True).start()
    runs = [folder.run_of(trial) for trial in trials]
    while not futures.wait([future], timeout=1.0).done:
        name = folder.stop.read_text(encoding="utf-8").strip()
        for run in runs:
            if not (run.root / Mark.BUSY).is_file():
                free_group(run)
            elif name and run.stop.is_file():
                run.stop.write_text(name, encoding="utf-8")
    # The processes of the last pruned trials may take a moment to end.
    deadline = time.monotonic() + _CLOSE_S
    while any(run.group.is_file() for run in runs) and time.monotonic() < deadline:
        for run in runs:
            free_group(run)
        time.sleep(0.2)
    future.result()


def _count_steps(config: RunConfig, base: BaseFiles | None) -> int:
    examples = load_training_set(config, base).encoded
    return count_steps(make_sampler(config, examples), config.train.epochs, config.train.max_steps)


def _bundles(config: RunConfig) -> list[Bundle]:
    train = config.train
    gpus = {"GPU": train.gpus_per_worker} if train.device == "cuda" else {}
    return [{"CPU": train.cpus_per_worker} | gpus] * train.num_workers


def _count_concurrent(config: RunConfig) -> int:
    """Return how many trials an otherwise empty cluster has room for."""
    total = ray.cluster_resources()
    (bundle, *_), workers = _bundles(config), config.train.num_workers
    need = {kind: amount * workers for kind, amount in bundle.items()}
    need["CPU"] += _DRIVER_CPUS
    return max(1, min(int(total.get(kind, 0.0) / amount + 1e-6) for kind, amount in need.items() if amount))


def _raise_when_stopped(folder: SearchFolder, done: int, total: int) -> None:
    name = folder.stop.read_text(encoding="utf-8").strip()
    if name:
        stop = describe_stop(folder.stop, 0, 0)
        raise StoppedError(
            f"Stopped by {name} with {done} of {total} trials ended: the same command resumes the others from their last "
            "checkpoints.",
            stop.exit_code,
        )


def _explain_unplaced(folder: SearchFolder, trials: Sequence[Trial]) -> str:
    for trial in trials:
        with contextlib.suppress(FileNotFoundError):
            return (folder.run_of(trial).root / Mark.UNPLACED).read_text(encoding="utf-8")
    raise FinloraError(f"{folder.root}: some trials have not ended and left no reason: start the same command again.")
