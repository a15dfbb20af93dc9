"""Search space: the settings that a search varies, and its trials. No Ray here.

A search is a run's config with one section more:

    search:
      num_trials: 24
      rank: [4, 8, 16]
      bits: [4, 8]
      learning_rate: [3.0e-5, 1.0e-3]

The first trial is the unchanged config. ASHA never stops it, so that the best trial is at least as good. The others cover the
space evenly by a Halton sequence: each choice and each part of the learning rates is sampled about as often as any other. They
depend on the config alone: the same config always gives the same trials under the same names, and a larger num_trials starts
with the same ones. A resumed search relies on that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from finlora.config import Bits, RunConfig
from finlora.configfile import config_to_tree, load_with_section
from finlora.errors import ConfigError

Objective = Literal["accuracy", "weighted_f1", "strict_accuracy", "numeric_accuracy", "peak_memory_gib", "hours"]
LARGER_IS_BETTER = ("accuracy", "weighted_f1", "strict_accuracy", "numeric_accuracy")
OWN = "000-"
"""Prefix of the name of the first trial, the unchanged config."""
_BITS = (16, 8, 4)


FREE_SETTINGS = {
    "": ("output_dir", "max_wait_s", "name", "tracking"),
    "search": ("num_trials", "objectives", "max_concurrent", "retry_failed"),
}
"""Settings that may differ when a search resumes, by section."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """The section `search`."""

    num_trials: int = 16
    """Number of trials, including the first, which is the config without changes."""
    rank: tuple[int, ...] = (4, 8, 16)
    """LoRA ranks to try. Empty: lora.rank only."""
    bits: tuple[int, ...] = (4, 8)
    """Bits of the base to try. Empty: model.bits only."""
    learning_rate: tuple[float, ...] = (3e-5, 1e-3)
    """Lowest and highest learning rate, sampled evenly on a logarithmic scale. Empty: optim.learning_rate only."""
    alpha: tuple[float, ...] = ()
    """Values of alpha to try. Empty: lora.alpha only."""
    target_modules: tuple[str, ...] = ()
    """Sets of projections to try, joined by `+`: `[q_proj+v_proj, q_proj+k_proj+v_proj]`. Empty: lora.target_modules
    only."""
    objectives: tuple[Objective, ...] = ("weighted_f1", "accuracy", "peak_memory_gib", "hours")
    """Objectives of the Pareto front. The first one, a score on held-out training examples, decides which trial is best."""
    validation_share: float = 0.15
    """Share of the training examples that is held out to score the trials. The test split is never used."""
    grace_share: float = 0.1
    """Share of its steps that each trial runs before ASHA may stop it."""
    reduction_factor: int = 3
    """At each rung ASHA lets one in so many trials continue. 1: all trials run to their end."""
    max_concurrent: int | None = None
    """Most trials at once. None: as many as the cluster has room for."""
    retry_failed: bool = False
    """Run failed trials again when the search is resumed."""

    def __post_init__(self) -> None:
        rates = self.learning_rate
        checks = [
            (self.num_trials >= 1, f"num_trials={self.num_trials}: expected at least 1"),
            (all(rank >= 1 for rank in self.rank), f"rank={list(self.rank)}: expected integers of at least 1"),
            (set(self.bits) <= set(_BITS), f"bits={list(self.bits)}: expected some of 16, 8 and 4"),
            (
                not rates or (len(rates) == 2 and 0 < rates[0] <= rates[1]),
                f"learning_rate={list(rates)}: expected the lowest and the highest, both more than 0",
            ),
            (
                bool(self.objectives) and self.objectives[0] in LARGER_IS_BETTER,
                f"objectives={list(self.objectives)}: expected one of {', '.join(LARGER_IS_BETTER)} to come first, since the "
                "search maximises the first one",
            ),
            (
                0 < self.validation_share <= 0.5,
                f"validation_share={self.validation_share}: expected more than 0 and at most 0.5",
            ),
            (0 < self.grace_share <= 1, f"grace_share={self.grace_share}: expected more than 0 and at most 1"),
            (self.reduction_factor >= 1, f"reduction_factor={self.reduction_factor}: expected at least 1"),
            (
                self.max_concurrent is None or self.max_concurrent >= 1,
                f"max_concurrent={self.max_concurrent}: expected at least 1, or null",
            ),
        ]
        faults = [f"search.{message}" for is_good, message in checks if not is_good]
        if faults:
            raise ConfigError(faults)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One point of the space."""

    name: str
    """Number and settings, unique within a search: `003-4bit-r8-2.1e-04`."""
    rank: int
    bits: Bits
    learning_rate: float
    alpha: float
    target_modules: tuple[str, ...]

    def apply(self, config: RunConfig) -> RunConfig:
        """Return the config with this trial's settings.

        Raises:
            ConfigError: a setting is out of range, as an unknown projection.
        """
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, bits=self.bits),
            lora=dataclasses.replace(config.lora, rank=self.rank, alpha=self.alpha, target_modules=self.target_modules),
            optim=dataclasses.replace(config.optim, learning_rate=self.learning_rate),
        )


def load_search(path: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, SearchConfig]:
    """Read a config with its section `search`, from YAML and overrides as `search.num_trials=24`.

    Raises:
        ConfigError: every fault of both together.
    """
    return load_with_section(path, overrides, "search", SearchConfig)


def sample_trials(config: RunConfig, search: SearchConfig) -> list[Trial]:
    """Return the trials of a search, always the same for the same config.

    Raises:
        ConfigError: search.target_modules names an unknown projection.
    """
    from scipy.stats import qmc  # half a second to import

    own = (config.lora.rank, config.model.bits, config.lora.alpha, config.lora.target_modules)
    choices: tuple[tuple[Any, ...], ...] = (
        search.rank or own[:1],
        search.bits or own[1:2],
        search.alpha or own[2:3],
        tuple(tuple(names.split("+")) for names in search.target_modules) or own[3:],
    )
    low, high = search.learning_rate or (config.optim.learning_rate,) * 2
    # A longer Halton sequence starts with the same points.
    cube = qmc.Halton(d=len(choices) + 1, rng=config.seed).random(search.num_trials - 1).tolist()
    points = [(*own, config.optim.learning_rate)]
    for *shares, rate_share in cube:  # each in [0, 1)
        chosen = (options[int(share * len(options))] for share, options in zip(shares, choices, strict=True))
        # Three digits tell trials apart and read well in YAML.
        points.append((*chosen, float(f"{low * (high / low) ** rate_share:.2e}")))
    trials = [_make_trial(number, *point) for number, point in enumerate(points)]
    for trial in trials:
        trial.apply(config)
    return trials


def hash_search(config: RunConfig, search: SearchConfig) -> str:
    """Return 16 hex digits of the hash of what decides the trials and their scores; num_trials may grow."""
    section = dataclasses.asdict(search)
    for name in FREE_SETTINGS["search"]:
        section.pop(name)
    tree = config_to_tree(config)
    for name in FREE_SETTINGS[""]:
        tree.pop(name)
    return hashlib.sha256(json.dumps([tree, section], sort_keys=True).encode()).hexdigest()[:16]


def _make_trial(
    number: int, rank: int, bits: int, alpha: float, target_modules: tuple[str, ...], learning_rate: float
) -> Trial:
    return Trial(
        name=f"{number:03d}-{bits}bit-r{rank}-{learning_rate:.2e}",
        rank=rank,
        bits=cast(Bits, bits),
        learning_rate=learning_rate,
        alpha=alpha,
        target_modules=tuple(target_modules),
    )
