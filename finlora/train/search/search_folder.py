"""Folder of one search: its settings, its split of the training examples, and the record of each trial. No Ray here.

Layout of OUTPUT_DIR/NAME:
    search.yaml            the resolved config with its section `search`, enough to repeat the search
    data/                  the training examples of each task, split into kept and held-out ones
    trials/NAME/           run folder of a trial (run/run_folder.py), with held_out.jsonl: the loss on the held-out examples
    trials/NAME/trial.json how the trial ended; the trial counts as ended once this file exists
    base-cache/            the quantised bases that the trials share (finlora/model/base_cache.py); removed at the end
    tune/                  Ray Tune's own files
    best.yaml              the best trial's config, ready to train on all training examples
    front.md, front.png    the Pareto front
    stop                   a signal's name in it asks all trials to stop
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from finlora.config import RunConfig
from finlora.configfile import config_to_tree, settings_from_tree
from finlora.data.example import Splits
from finlora.data.sets.catalog import task_named
from finlora.data.sets.prepare import code_version
from finlora.data.sets.prepared import read_prepared, write_prepared
from finlora.data.taskfile.load import read_card
from finlora.data.taskfile.read import make_task
from finlora.data.taskfile.split import hold_out_latest
from finlora.durable import seal, unseal, write_whole
from finlora.errors import ConfigError, DatasetError, ResultError
from finlora.precision import resolve_training
from finlora.results import SEARCH_MARK
from finlora.train.run.run_folder import RunFolder, list_differences, require_unclaimed
from finlora.train.search.space import FREE_SETTINGS, SearchConfig, Trial, hash_search
from finlora.yamltext import read_yaml

RECORD = "trial.json"
_HASH = "hash"


class TrialState(StrEnum):
    """How a trial ended, in the words of its record."""

    FINISHED = "finished"
    PRUNED = "pruned"
    """Stopped by ASHA."""
    FAILED = "failed"


class Mark(StrEnum):
    """File in a trial's folder by which its driver and the search's process exchange its state."""

    BUSY = "busy"
    """Its driver works."""
    UNPLACED = "unplaced"
    """It waited too long for GPUs or cores; holds the reason."""
    PRUNED = "pruned"
    """ASHA stopped it; holds the step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialRecord:
    """Record of a trial that has ended."""

    trial: Trial
    state: TrialState
    step: int
    """Optimiser steps done."""
    total_steps: int
    held_out_loss: float | None
    """Mean cross entropy per answer token on the held-out examples, at that step."""
    scores: dict[str, float] = field(default_factory=dict)
    """Finished trials: the scores of LARGER_IS_BETTER that every task has, as means over tasks; peak_memory_gib of training;
    hours of its steps, times GPUs, or workers on CPU."""
    seconds: float = 0.0
    """Work of all attempts of the trial and of its scoring, start-up included."""
    cause: str = ""
    """Reason why it did not finish."""


@dataclass(frozen=True, slots=True)
class SearchFolder:
    """Paths of one search."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / SEARCH_MARK

    @property
    def data(self) -> Path:
        return self.root / "data"

    @property
    def trials(self) -> Path:
        return self.root / "trials"

    @property
    def cache(self) -> Path:
        return self.root / "base-cache"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
    def best(self) -> Path:
        return self.root / "best.yaml"

    def run_of(self, trial: Trial) -> RunFolder:
        """Return the folder of a trial's training."""
        return RunFolder(self.trials / trial.name)


def search_folder(config: RunConfig) -> SearchFolder:
    """Return the folder of a config's search."""
    return SearchFolder(Path(config.output_dir) / config.name)


def examine_search(config: RunConfig, search: SearchConfig) -> SearchFolder:
    """Return the folder of a search that this process may start or resume. Changes nothing.

    Raises:
        ConfigError: the folder holds a search with other settings, each of which is named, or something else.
        ResourceError: another driver is at work in the folder.
    """
    folder = search_folder(config)
    _refuse_other_search(folder, resolve_training(config, folder.config), search)
    require_unclaimed(RunFolder(folder.root))
    return folder


def open_search(config: RunConfig, search: SearchConfig) -> SearchFolder:
    """Create or reopen the search's folder, and split the training examples.

    Raises:
        ConfigError: the folder holds a search with other settings, or something else.
        DatasetError: the prepared data is missing or too small to split.
    """
    folder = search_folder(config)
    _refuse_other_search(folder, config, search)
    for task in config.data.tasks:
        split_examples(Path(config.data.dir), task, folder.data, search.validation_share, config.seed)
    folder.trials.mkdir(parents=True, exist_ok=True)
    tree = {_HASH: hash_search(config, search), **_to_tree(config, search)}
    write_whole(folder.config, yaml.safe_dump(tree, sort_keys=False))
    return folder


def read_settings(folder: SearchFolder) -> tuple[RunConfig, SearchConfig]:
    """Return the settings of a search, as its folder holds them.

    Raises:
        ConfigError: they cannot be read.
    """
    tree = _read_tree(folder.config)
    tree.pop(_HASH, None)
    section = tree.pop("search", None) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{folder.config} is damaged: expected keys below search, found {section!r}.")
    return settings_from_tree(RunConfig, tree), settings_from_tree(SearchConfig, section)


def read_ended(folder: SearchFolder, search: SearchConfig, trials: Sequence[Trial]) -> list[TrialRecord] | None:
    """Return the records of a search in which no trial is left to run, in the trials' order; None where one is left.

    Raises:
        ResultError: a record is damaged.
    """
    records = [read_record(folder, trial) for trial in trials]
    ended = [record for record in records if record is not None]
    is_retried = search.retry_failed and any(record.state == TrialState.FAILED for record in ended)
    return ended if len(ended) == len(trials) and folder.config.is_file() and not is_retried else None


def _to_tree(config: RunConfig, search: SearchConfig) -> dict[str, Any]:
    return {**config_to_tree(config), "search": _listed(dataclasses.asdict(search))}


def _refuse_other_search(folder: SearchFolder, config: RunConfig, search: SearchConfig) -> None:
    if folder.config.is_file():
        tree = _read_tree(folder.config)
        if tree.get(_HASH) != hash_search(config, search):
            differing = list_differences(tree, _to_tree(config, search), FREE_SETTINGS)
            named = "; ".join(differing) or "written by another version of FinLoRA"
            raise ConfigError(
                f"{folder.root} already holds a search with other settings ({named}): restore them to resume it, or choose "
                "another `name`."
            )
    elif folder.root.exists() and any(folder.root.iterdir()):
        raise ConfigError(f"{folder.root} holds something else than a search: choose another `name`.")


def split_examples(source: Path, task: str, target: Path, share: float, seed: int) -> None:
    """Hold out a share of a task's training examples, in whole groups, and write both parts as a prepared set. If a task is split
    by time, the latest groups are held out.

    The held-out part is written as HELD_OUT_SPLIT, so that training and evaluation read it as any other set.

    Raises:
        DatasetError: there is no train split, or it has a single group.
    """
    import numpy as np

    split = read_prepared(source, task, "train")
    examples = split.examples
    own = read_card(split.card) if split.card else None
    if own is not None and own.split_by == "time":
        times, groups = [example.time for example in examples], [example.group for example in examples]
        rows = hold_out_latest(times, groups, share, own.split.gap_days)
        train, held = ([examples[row] for row in part] for part in rows)
        note = f"the latest {len(held)} of {len(examples)} examples held out, {len(train)} kept, as the task is split by time"
    else:
        names = list(dict.fromkeys(example.group for example in examples))
        order = np.random.default_rng(seed).permutation(len(names))
        chosen = {names[index] for index in order[: max(1, round(share * len(names)))]}
        train = [example for example in examples if example.group not in chosen]
        held = [example for example in examples if example.group in chosen]
        note = f"{len(chosen)} of {len(names)} groups held out"
    if not train:
        raise DatasetError(
            f"{task} has {len(examples)} training examples of one group: expected at least two groups, to hold one out."
        )
    parts = Splits(
        train=tuple(train),
        test=tuple(held),  # HELD_OUT_SPLIT
        notes=(f"Split off from the train split for a search: {note}.",),
    )
    write_prepared(
        task_named(task) if own is None else make_task(own),
        parts,
        target,
        variant=split.variant,
        source=f"train split {split.hash[:16]} of {split.source}",
        version=code_version(),
        overwrite=False,
        dry_run=False,
    )


def trial_config(config: RunConfig, search: SearchConfig, folder: SearchFolder, trial: Trial, steps: int) -> RunConfig:
    """Return the config of a trial's training: its settings, on the kept examples, with a report at each rung of ASHA.

    Args:
        steps: optimiser steps before the first rung.
    """
    applied = trial.apply(config)
    return dataclasses.replace(
        applied,
        name=trial.name,
        output_dir=str(folder.trials),
        model=dataclasses.replace(applied.model, cache=applied.model.cache or str(folder.cache)),
        data=dataclasses.replace(applied.data, dir=str(folder.data)),
        train=dataclasses.replace(applied.train, checkpoint_every_steps=steps),
        # The search's own process tracks its trials (finlora/train/search/track_search.py).
        tracking=dataclasses.replace(applied.tracking, mlflow=None, wandb=None),
    )


def best_config(config: RunConfig, trial: Trial) -> RunConfig:
    """Return the config that trains a trial's settings on all training examples, even where the search was limited."""
    data = dataclasses.replace(config.data, max_train_examples=None, max_test_examples=None)
    return dataclasses.replace(trial.apply(config), name=f"{config.name}-best", data=data)


def count_grace_steps(search: SearchConfig, total_steps: int) -> int:
    """Return the steps before ASHA's first rung."""
    return max(1, math.ceil(search.grace_share * total_steps))


def write_record(folder: SearchFolder, record: TrialRecord) -> None:
    """Write a trial's record atomically."""
    run = folder.run_of(record.trial)
    run.root.mkdir(parents=True, exist_ok=True)
    write_whole(run.root / RECORD, json.dumps(seal(dataclasses.asdict(record)), indent=1))


def read_record(folder: SearchFolder, trial: Trial) -> TrialRecord | None:
    """Return a trial's record; None where the trial has not ended.

    Raises:
        ResultError: the record is damaged.
    """
    path = folder.run_of(trial).root / RECORD
    if not path.is_file():
        return None
    try:
        values = unseal(json.loads(path.read_text(encoding="utf-8")))
        own = settings_from_tree(Trial, values.pop("trial"))
        return TrialRecord(trial=own, state=TrialState(values.pop("state")), **values)
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise ResultError(
            f"{path} is damaged and no longer says how the trial ended ({error}): delete that file, and the search scores its "
            "adapter again without training it again."
        ) from error


def _read_tree(path: Path) -> dict[str, Any]:
    """Return a search's settings and their hash; empty where the file holds none."""
    try:
        tree = read_yaml(path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{path} is damaged ({' '.join(str(error).split())}): delete that file and start the search with its settings again; "
            "trials that have ended count."
        ) from error
    return tree if isinstance(tree, dict) else {}


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
