"""Folder of one training run: paths, settings, lock and training set. No Ray here.

Layout of OUTPUT_DIR/NAME:
    config.yaml        the resolved config, enough to repeat the run
    progress.jsonl     one Progress a line, appended by worker 0
    step               steps done and steps in all, at most 5 s old; empty until a started worker has done a step
    tensorboard/       the same numbers as TensorBoard events
    plan.txt           how the workers train, and the memory they need by forecast
    checkpoint_*/      Ray Train's checkpoints (finlora/train/run/checkpoint.py)
    lock               locked by the driver while it runs
    start.json         how far the workers' start is, and its seconds (finlora/train/run/start_note.py)
    waiting.txt        who holds the GPUs and cores that the run waits for (finlora/train/run/wait_for_gpus.py)
    adapter_start.safetensors   what lora.init took out of the base's weights, if anything (finlora/train/run/adapter_start.py)
    attempts.json      seconds of work and of waiting for each start of the driver (finlora/train/run/attempts.py)
    stop               empty; a signal's name in it asks the workers to stop (finlora/train/run/stop.py)
    adapter/           PEFT's two files and config.yaml; finlora.yaml is written last and marks the run as finished
    results.jsonl      one Result of this training, and one for each evaluation
    answers/           the answers of each evaluation (finlora/evaluate/answer_table.py)
    tracking/          the run's id in each tracking system, and what is logged there (finlora/train/tracking/tracked.py)
    wandb/             files of W&B for `wandb sync`, with tracking.wandb=offline
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finlora.config import SQLITE, RunConfig
from finlora.configfile import config_to_tree, load_config, save_config, tree_for_hash
from finlora.data.encode import Encoded, encode_examples
from finlora.data.sets.prepared import read_prepared
from finlora.durable import try_lock
from finlora.errors import ConfigError, ResourceError
from finlora.machine.foreign_errors import is_disk_full
from finlora.machine.working_dir import describe_lost
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.precision import resolve_training
from finlora.results import SEARCH_MARK

# Settings that may differ when a run resumes: they change paths, intervals and memory, not what is computed.
_FREE_SETTINGS = {
    "": ("output_dir", "eval", "max_wait_s", "tracking"),
    "model": ("cache",),
    "data": ("dir", "max_test_examples"),
    # A share of a GPU and the last four change only the memory layout: sums round in another order, dropout samples other masks.
    "train": (
        *(
            "max_failures",
            "max_stall_s",
            "keep_checkpoints",
            "checkpoint_every_steps",
            "log_every_steps",
            "cpus_per_worker",
            "gpus_per_worker",
        ),
        *("memory_gib", "max_pack_tokens", "recompute", "unpack_weights"),
    ),
}

_WRITTEN = ("output_dir", "model.cache", "tracking.mlflow")
"""Settings of paths that a run writes to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSet:
    """Encoded examples of all trained tasks."""

    encoded: list[Encoded]
    hashes: dict[str, str]
    """Task -> hash of its prepared train split."""
    num_skipped: int
    """Examples longer than model.max_seq_len, left out by data.too_long=skip."""
    cards: dict[str, str]
    """Name of a task that a task file defines -> that file, as YAML."""
    card_hashes: dict[str, str]
    """Task of a task file -> hash of what it asks."""
    licences: dict[str, str]
    """Task -> licence of its data."""
    base: BaseFiles = field(compare=False)
    """The base that they were encoded for; two sets are compared by what they hold."""

    @property
    def template_date(self) -> str | None:
        """Date that the chat template writes into each prompt. None: it writes none, or always its own."""
        return self.base.template_date

    def name_inputs(self, weights_hash: str) -> dict[str, str]:
        """Return the hashes of a run's inputs: base weights, data and prompt date."""
        # Runs from before dates were fixed have no such entry; their prompts carried the day of each attempt.
        date = {"template date": self.template_date} if self.template_date else {}
        return {**self.hashes, "base": weights_hash, **date}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of one run."""

    root: Path

    @property
    def title(self) -> str:
        """Name of the run in messages to others who wait for its GPUs."""
        if self.root.parent.name == "trials":
            return f"trial {self.root.name} of the search {self.root.parent.parent.name}"
        return f"the training {self.root.name}"

    @property
    def adapter(self) -> Path:
        return self.root / "adapter"

    @property
    def progress(self) -> Path:
        return self.root / "progress.jsonl"

    @property
    def step(self) -> Path:
        return self.root / "step"

    @property
    def results(self) -> Path:
        return self.root / "results.jsonl"

    @property
    def answers(self) -> Path:
        return self.root / "answers"

    @property
    def tracking(self) -> Path:
        return self.root / "tracking"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def waiting(self) -> Path:
        return self.root / "waiting.txt"

    @property
    def start(self) -> Path:
        return self.root / "start.json"

    @property
    def adapter_start(self) -> Path:
        return self.root / "adapter_start.safetensors"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts.json"

    @property
    def group(self) -> Path:
        return self.root / "group"

    @property
    def plan(self) -> Path:
        return self.root / "plan.txt"

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"


def resolve_paths(config: RunConfig) -> RunConfig:
    """Make every local path absolute: workers run in other folders.

    Raises:
        ConfigError: a path is relative inside a submitted Ray job, whose working directory is deleted afterwards.
    """
    faults: list[str] = []

    def resolve(key: str, value: str, start: str = "") -> str:
        path = Path(value).expanduser()
        # A job's copy of the working directory can be read; what is written there is lost.
        if (key in _WRITTEN or not path.exists()) and (lost := describe_lost(f"{key}={start}", value)):
            faults.append(lost)
        return f"{start}{path.absolute()}"

    is_local_base = Path(config.model.base).expanduser().exists()
    store = config.tracking.mlflow or ""
    resolved = dataclasses.replace(
        config,
        output_dir=resolve("output_dir", config.output_dir),
        data=dataclasses.replace(config.data, dir=resolve("data.dir", config.data.dir)),
        model=dataclasses.replace(
            config.model,
            base=resolve("model.base", config.model.base) if is_local_base else config.model.base,
            tokenizer=config.model.tokenizer and resolve("model.tokenizer", config.model.tokenizer),
            cache=config.model.cache and resolve("model.cache", config.model.cache),
        ),
        tracking=dataclasses.replace(
            config.tracking,
            mlflow=resolve("tracking.mlflow", store.removeprefix(SQLITE), SQLITE)
            if store.startswith(SQLITE)
            else config.tracking.mlflow,
        ),
    )
    if faults:
        raise ConfigError(faults)
    return resolved


def load_training_set(config: RunConfig, base: BaseFiles | None = None) -> TrainingSet:
    """Read the prepared train splits, keep a seeded sample of data.max_train_examples, and encode it.

    Args:
        base: files of the base, if this process has found and checked them already. None: it does so here.

    Raises:
        DatasetError: a split is missing, damaged, or an example is too long.
        ModelError: the base or its tokenizer is not usable.
    """
    import numpy as np

    splits = [read_prepared(Path(config.data.dir), task, "train") for task in config.data.tasks]
    examples = [example for split in splits for example in split.examples]
    limit = config.data.max_train_examples
    if limit is not None and limit < len(examples):
        order = np.random.default_rng(config.seed).permutation(len(examples))[:limit]
        examples = [examples[index] for index in sorted(order)]
    base = base or read_base_files(config.model)
    encoded, kept = encode_examples(
        examples,
        base.tokenizer,
        template=config.model.template,
        max_seq_len=config.model.max_seq_len,
        too_long=config.data.too_long,
        date=base.template_date,
    )
    hashes = {task: split.hash for task, split in zip(config.data.tasks, splits, strict=True)}
    pairs = list(zip(config.data.tasks, splits, strict=True))
    return TrainingSet(
        encoded=encoded,
        hashes=hashes,
        num_skipped=len(examples) - len(kept),
        cards={task: split.card for task, split in pairs if split.card},
        card_hashes={task: split.card_hash for task, split in pairs if split.card_hash},
        licences={task: split.licence for task, split in pairs},
        base=base,
    )


def describe_run(config: RunConfig, training_set: TrainingSet) -> str:
    """Return the resolved config and a summary of the training, for --dry-run."""
    lengths = sorted(item.num_tokens for item in training_set.encoded)
    train = config.train
    steps = -(-len(lengths) // train.global_batch_size) * train.epochs
    steps = min(steps, train.max_steps or steps)
    cut = "packed" if train.packing else f"micro-batches of {train.micro_batch_size}"
    return (
        f"{yaml.safe_dump(config_to_tree(config), sort_keys=False)}\n"
        f"{len(lengths):,} examples ({training_set.num_skipped} skipped), {sum(lengths):,} tokens, length "
        f"{lengths[0]} / {lengths[len(lengths) // 2]} / {lengths[-1]} (shortest / median / longest)\n"
        f"{steps:,} optimiser steps of {train.global_batch_size} examples: {train.num_workers} workers, {cut}\n"
        f"{described + chr(10) if (described := describe_date(training_set)) else ''}"
        f"Dry run: nothing was started or written."
    )


def describe_date(training_set: TrainingSet) -> str:
    """Return a line with the date that the chat template writes into each prompt; empty where it writes none."""
    date = training_set.template_date
    return f"Date in the chat template: {date} on every day (model.template_date)" if date else ""


def hash_run(config: RunConfig, hashes: dict[str, str]) -> str:
    """Return 16 hex digits of the hash of all settings and inputs that decide what the run computes."""
    tree = tree_for_hash(config)
    for section, keys in _FREE_SETTINGS.items():
        for key in keys:
            (tree[section] if section else tree).pop(key)
    tree["train"]["gpus_per_worker"] = 1.0  # runs from before it was free have it in their hash
    text = json.dumps([tree, hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def examine_run(config: RunConfig) -> RunFolder:
    """Return the folder of a run that this process may start or resume. Changes nothing.

    Raises:
        ConfigError: a run of that name exists with other settings; names each that differs. Or it is a search.
        ResourceError: another driver works in the folder.
    """
    folder = RunFolder(Path(config.output_dir) / config.name)
    _refuse_other_run(folder, resolve_training(config, folder.config))
    require_unclaimed(folder)
    return folder


def open_run(config: RunConfig) -> RunFolder:
    """Create or reopen the run's folder.

    Raises:
        ConfigError: a run of that name exists with other settings; names each that differs.
    """
    folder = RunFolder(Path(config.output_dir) / config.name)
    _refuse_other_run(folder, config)
    save_config(config, folder.config)
    return folder


def _refuse_other_run(folder: RunFolder, config: RunConfig) -> None:
    if (folder.root / SEARCH_MARK).is_file():
        raise ConfigError(f"{folder.root} holds a search, not a run: choose another `name`.")
    if folder.config.is_file():
        try:
            there = config_to_tree(load_config(folder.config))
        except ConfigError as error:
            raise ConfigError(
                f"{folder.config} belongs to a run and cannot be read by this version ({error}): resume the run with the "
                "version that wrote it, or choose another `name`."
            ) from error
        differing = list_differences(there, config_to_tree(config), _FREE_SETTINGS)
        if differing:
            raise ConfigError(
                f"{folder.root} already holds a run with other settings ({'; '.join(differing)}): restore them to resume "
                "it, or choose another `name`."
            )


def explain_full_disk(error: BaseException, folder: RunFolder) -> ResourceError | None:
    """Return a ResourceError where the cause of an error is a full disk; None otherwise."""
    if not is_disk_full(error):
        return None
    return ResourceError(
        f"a file of the run could not be written ({error}): free disk space below {folder.root} and in the temporary folder of "
        "every node (TMPDIR). Earlier checkpoints are complete: the same command resumes from the last one."
    )


@contextlib.contextmanager
def claim_run(folder: RunFolder) -> Iterator[None]:
    """Hold the folder's lock against a second driver. The system releases the lock of a killed driver.

    Raises:
        ResourceError: another driver works in the folder; names its process and machine.
    """
    with folder.lock.open("a+", encoding="utf-8") as stream:
        if not try_lock(stream):
            stream.seek(0)
            raise ResourceError(
                f"{folder.root} is in use by {stream.read().strip()}: wait for that run to end or to stop, or choose another "
                "`name`."
            )
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {socket.gethostname()}")
        stream.flush()
        yield


def require_unclaimed(folder: RunFolder) -> None:
    """Refuse a folder in which another driver works.

    Raises:
        ResourceError: as `claim_run`.
    """
    if folder.lock.is_file():
        with claim_run(folder):
            pass


def list_differences(old: dict[str, Any], new: dict[str, Any], free: Mapping[str, Sequence[str]]) -> list[str]:
    """Return each setting that differs between two trees of settings, with both values.

    Args:
        free: settings that may differ, by section; "" for those outside sections.
    """
    found = []
    for section, value in new.items():
        if section in free.get("", ()):
            continue
        if not isinstance(value, dict):
            if old.get(section) != value:
                found.append(f"{section}: {old.get(section)} there, {value} here")
            continue
        there = old.get(section) or {}
        for key, inner in value.items():
            if key not in free.get(section, ()) and there.get(key) != inner:
                found.append(f"{section}.{key}: {there.get(key)} there, {inner} here")
    return found
