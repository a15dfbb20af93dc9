"""Step of a reproduction: one training or one evaluation with a name, and a key that tells whether its outcome still counts."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finlora.config import Bits, ModelConfig, RunConfig
from finlora.configfile import tree_for_hash
from finlora.errors import FinloraError
from finlora.model.source import find_source, fingerprint_weights
from finlora.train.run.run_folder import RunFolder

_ELSEWHERE = {
    "": ("output_dir", "max_wait_s", "tracking"),
    "model": ("base", "cache"),
    "data": ("dir",),
    "train": ("gpus_per_worker", "cpus_per_worker"),
    "eval": ("num_gpus",),
}
"""Settings by section that differ from machine to machine and decide no number: folders, and shares of a machine."""
_NUM_MEMORY_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One training or evaluation."""

    name: str
    kind: Literal["train", "evaluate"]
    config: RunConfig
    of_adapter: bool
    """Evaluations: True scores the adapter of the run config.name, False the base alone."""
    base_id: str
    """`identify_base` of the config's base."""

    @property
    def run(self) -> RunFolder:
        """Folder of the run whose adapter is trained or scored; evaluations of a base have one of their own."""
        return RunFolder(Path(self.config.output_dir) / self.config.name)

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter that this step trains or scores; None for the base alone."""
        is_base = self.kind == "evaluate" and not self.of_adapter
        return None if is_base else self.run.adapter

    @property
    def key(self) -> str:
        """16 hex digits of the hash of what decides the outcome: with other settings it is another step.

        Folders and shares of a machine do not count, so that a copied folder of outcomes is valid on another machine.
        """
        tree = tree_for_hash(self.config)
        for section, keys in _ELSEWHERE.items():
            for key in keys:
                (tree[section] if section else tree).pop(key)
        if self.kind == "train":
            del tree["eval"]
        text = json.dumps([self.kind, self.of_adapter, self.base_id, tree], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def identify_base(model: ModelConfig) -> str:
    """Return what names a base wherever it lies: the fingerprint of a folder's weights, or its id on the hub.

    A folder that is no usable base is named by its path; `find_obstacle` says what is wrong with it.
    """
    if not Path(model.base).is_dir():
        return model.base
    try:
        return fingerprint_weights(find_source(model))
    except FinloraError:
        return model.base


def train_and_evaluate(config: RunConfig, base_id: str) -> Iterator[Step]:
    """Return the training of a row, and the evaluation of its adapter."""
    yield Step(name=f"{config.name}-train", kind="train", config=config, of_adapter=True, base_id=base_id)
    yield evaluate(config, base_id, of_adapter=True)


def evaluate(config: RunConfig, base_id: str, *, of_adapter: bool) -> Step:
    """Return the evaluation of a row's adapter, or of its base alone."""
    return Step(name=f"{config.name}-evaluate", kind="evaluate", config=config, of_adapter=of_adapter, base_id=base_id)


def memory_step(size: str, bits: Bits, config: RunConfig, base_id: str) -> Step:
    """Return the step that measures inference memory at batch 1, as in the paper's table of models.

    Args:
        size: start of its name, such as `llama-8b`.
    """
    few = min(config.data.max_test_examples or _NUM_MEMORY_EXAMPLES, _NUM_MEMORY_EXAMPLES)
    own = dataclasses.replace(
        config,
        name=f"{size}-memory-{bits}bit",
        data=dataclasses.replace(config.data, max_test_examples=few),
        eval=dataclasses.replace(config.eval, bits=bits, batch_size=1),
    )
    return evaluate(own, base_id, of_adapter=False)


def with_seed(config: RunConfig, seed: int | None) -> RunConfig:
    """Return a row's config with another seed, which its name ends with; None: unchanged."""
    return config if seed is None else dataclasses.replace(config, name=f"{config.name}-seed{seed}", seed=seed)


def with_tasks(config: RunConfig, name: str, tasks: Sequence[str]) -> RunConfig:
    """Return a row's config under another name and with other tasks."""
    return dataclasses.replace(config, name=name, data=dataclasses.replace(config.data, tasks=tuple(tasks)))


def share_gpus(steps: Sequence[Step], at_once: int, num_gpus: float) -> list[Step]:
    """Return the steps with the share of a GPU that lets `at_once` of them run at the same time.

    Args:
        num_gpus: GPUs of the cluster. With at least `at_once` of them, a step keeps whole ones.
    """
    num_sharing = math.ceil(at_once / num_gpus) if num_gpus >= 1 else 1
    share = math.floor(1e4 / num_sharing) / 1e4  # Ray counts GPUs in steps of 0.0001

    def give(config: RunConfig) -> RunConfig:
        train, scoring = config.train, config.eval
        # A share that the user set stays.
        if train.device == "cuda" and train.gpus_per_worker == 1:
            train = dataclasses.replace(train, gpus_per_worker=share)
        if scoring.device == "cuda" and scoring.num_gpus == 1:
            scoring = dataclasses.replace(scoring, num_gpus=share)
        return dataclasses.replace(config, train=train, eval=scoring)

    return [dataclasses.replace(step, config=give(step.config)) for step in steps] if num_sharing > 1 else list(steps)
