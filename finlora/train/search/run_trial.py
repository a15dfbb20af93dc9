"""One trial of a search: train on the kept examples, score on the held-out ones, write the record."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from finlora.cluster import connect
from finlora.cluster.lease import seconds_waited
from finlora.config import RunConfig
from finlora.configfile import config_from_tree
from finlora.errors import NoRoomError, StoppedError
from finlora.results import Result, append_result, read_results
from finlora.train.held_out import HELD_OUT, read_held_out
from finlora.train.run.attempts import read_attempts
from finlora.train.run.progress import count_step_seconds
from finlora.train.run.run_folder import RunFolder
from finlora.train.run.wait_for_gpus import free_group
from finlora.train.search.search_folder import Mark, SearchFolder, TrialRecord, TrialState, read_record, write_record
from finlora.train.search.space import LARGER_IS_BETTER, Trial
from finlora.train.worker import run_training


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialTask:
    """Input of a trial's driver, in plain values that Ray can send."""

    config: dict[str, Any]
    search: str
    trial: Trial
    total_steps: int


def drive_trial(params: dict[str, Any], tasks: dict[str, TrialTask]) -> None:
    """Body of a trial's driver. It raises nothing: Ray Tune would restart it after an error as after a crash."""
    task = tasks[params["trial"]]
    folder, config = SearchFolder(Path(task.search)), config_from_tree(task.config)
    run = folder.run_of(task.trial)
    if folder.stop.read_text(encoding="utf-8").strip():
        return
    run.root.mkdir(parents=True, exist_ok=True)
    (run.root / Mark.BUSY).touch()
    free_group(run)  # of a driver of this trial that crashed
    if read_record(folder, task.trial) is not None:  # it crashed after its record, before Ray Tune knew
        (run.root / Mark.BUSY).unlink()
        return
    # Repeat the reports of a resumed trial to ASHA.
    for report in read_held_out(run):
        tune.report(report)
    try:
        scores, seconds = _train_and_score(config, run)
        write_end(folder, task, TrialState.FINISHED, scores=scores, scored_s=seconds)
        # Ray Tune wants the scheduler's metric in every report.
        tune.report({**read_held_out(run)[-1], "step": task.total_steps + 1, **scores})
    except StoppedError:
        return
    except NoRoomError as error:
        (run.root / Mark.UNPLACED).write_text(str(error), encoding="utf-8")
    except Exception as error:
        if (run.root / Mark.PRUNED).is_file():
            return  # ASHA has stopped this trial, and its processes end one by one
        kind = type(error).__name__.removesuffix("Error")
        write_end(folder, task, TrialState.FAILED, cause=f"{kind}: {error}")
    finally:
        (run.root / Mark.BUSY).unlink(missing_ok=True)


def _train_and_score(config: RunConfig, run: RunFolder) -> tuple[dict[str, float], float]:
    """Train, unless an earlier start has done so, and score the adapter on the held-out examples.

    Returns:
        The scores, and the seconds of scoring without the wait for room.
    """
    from finlora.evaluate.evaluation import run_evaluation
    from finlora.model.contract import CONTRACT_FILE

    results = read_results(run.results) if run.results.is_file() else []
    training = next((result for result in reversed(results) if result.kind == "training"), None)
    if training is None or not (run.adapter / CONTRACT_FILE).is_file():
        training = run_training(config, callbacks=[TuneReportCallback()], holds_out=True)
    train = config.train
    started = time.monotonic() - seconds_waited()
    evaluations = connect.call(
        run_evaluation,
        *(config, run.adapter, _ignore_progress),
        num_cpus=train.cpus_per_worker,
        num_gpus=train.gpus_per_worker if config.eval.device == "cuda" else 0.0,
        wait_s=config.max_wait_s,
        title=run.title,
    )
    seconds = time.monotonic() - seconds_waited() - started
    for result in evaluations:
        append_result(run.results, result)
    return _collect_scores(config, run, training, evaluations), seconds


def _collect_scores(
    config: RunConfig, run: RunFolder, training: Result, evaluations: Sequence[Result]
) -> dict[str, float]:
    """Return the objectives that were measured: scores as means over tasks, memory and hours of training."""
    scores = {}
    for name in LARGER_IS_BETTER:
        values = [result.metrics[name] for result in evaluations if name in result.metrics]
        if len(values) == len(evaluations):
            scores[name] = sum(values) / len(values)
    if training.peak_memory_gib is not None:
        scores["peak_memory_gib"] = training.peak_memory_gib
    # Steps only: start-ups would hide the differences between trials.
    scores["hours"] = count_step_seconds(run) / 3600 * _count_devices(config)
    return scores


def _count_devices(config: RunConfig) -> float:
    """Return the GPUs of a trial, or its workers on CPU."""
    train = config.train
    return train.num_workers * (train.gpus_per_worker if train.device == "cuda" else 1.0)


def write_end(
    folder: SearchFolder,
    task: TrialTask,
    state: TrialState,
    *,
    scores: dict[str, float] | None = None,
    scored_s: float = 0.0,
    cause: str = "",
) -> None:
    """Write a trial's record with the last held-out loss of its workers."""
    reports = read_held_out(folder.run_of(task.trial))
    record = TrialRecord(
        trial=task.trial,
        state=state,
        step=int(reports[-1]["step"]) if reports else 0,
        total_steps=task.total_steps,
        held_out_loss=reports[-1][HELD_OUT] if reports else None,
        scores=scores or {},
        seconds=scored_s + sum(attempt.seconds for attempt in read_attempts(folder.run_of(task.trial))),
        cause=" ".join(cause.split()),  # one line for the table
    )
    write_record(folder, record)


def _ignore_progress(_task: str, _done: int, _total: int) -> None:
    """No progress is shown: a trial's evaluation is short."""
