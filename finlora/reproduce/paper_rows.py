"""Steps of the paper's reproduction, made from one config for each row of its tables. No Ray here.

A step is one training or one evaluation with its own name. Cheap steps come first: 8B bases, their adapters, then 70B. Two
additions are future work in the paper: formula questions over XBRL (generated, as the published questions are not available)
and, at 8B, adapters of several tasks: one for the four sentiment tasks, one for all six classification tasks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from finlora.config import Bits, RunConfig
from finlora.configfile import config_to_tree, load_config
from finlora.errors import ConfigError
from finlora.precision import resolve_training
from finlora.train.run.run_folder import resolve_paths

FAMILIES = ("llama-8b-4bit-r4", "llama-8b-8bit-r8", "llama-70b-4bit-r4")
PAPER_TASKS = ("fpb", "fiqa", "tfns", "nwgi", "headline", "ner", "xbrl")
TASKS = (*PAPER_TASKS, "formulas")
TOGETHER = {
    "sentiment": ("fpb", "fiqa", "tfns", "nwgi"),
    "classification": ("fpb", "fiqa", "tfns", "nwgi", "ner", "headline"),
}
"""Row of an adapter for several tasks -> its tasks."""
_NUM_MEMORY_EXAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One training or evaluation."""

    name: str
    kind: Literal["train", "evaluate"]
    config: RunConfig
    of_adapter: bool
    """Evaluations: True scores the adapter of the run config.name, False the base alone."""

    @property
    def adapter(self) -> Path | None:
        """Folder of the adapter that this step trains or scores; None for the base alone."""
        is_base = self.kind == "evaluate" and not self.of_adapter
        return None if is_base else Path(self.config.output_dir) / self.config.name / "adapter"

    @property
    def key(self) -> str:
        """16 hex digits of the hash of what decides the outcome: with other settings it is another step."""
        tree = config_to_tree(self.config)
        tree.pop("max_wait_s")
        text = json.dumps([self.kind, self.of_adapter, tree], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_plan(
    configs: Path, output: Path, overrides: Sequence[str], only: str = "*", bases: Mapping[str, str] | None = None
) -> list[Step]:
    """Return the steps of the whole reproduction in order.

    Args:
        configs: folder with one YAML for each row of the paper, as jobs/configs.
        output: folder of the reproduction; runs go below it.
        overrides: `key=value` texts for every row, as train.num_workers=1.
        only: pattern of step names, such as `*8b*ner*`.
        bases: size, `8b` or `70b`, -> model.base of its rows. Other sizes keep the base of their config.

    Raises:
        ConfigError: a row has no config, a setting is wrong, or the pattern matches no step.
    """
    missing = [row for row in _rows() if not (configs / f"{row}.yaml").is_file()]
    if missing:
        raise ConfigError(
            f"{configs} lacks {len(missing)} of {len(_rows())} rows ({missing[0]}.yaml, ...): give --configs the "
            "folder jobs/configs of FinLoRA's sources."
        )

    def load(row: str) -> RunConfig:
        base = (bases or {}).get(row.split("-")[1])
        own = [*overrides, f"output_dir={output / 'runs'}", *([f"model.base={base}"] if base else [])]
        return resolve_training(resolve_paths(load_config(configs / f"{row}.yaml", own)))

    loaded = {row: load(row) for row in _rows()}
    steps = [step for size in ("8b", "70b") for step in _plan_size(size, loaded)]
    chosen = [step for step in steps if fnmatch(step.name, only)]
    if not chosen:
        raise ConfigError(
            f"--only {only!r} matches none of {len(steps)} steps: their names are {', '.join(_brief(steps))}."
        )
    return chosen


def _rows() -> list[str]:
    return [f"{family}-{task}" for family in FAMILIES for task in TASKS]


def _brief(steps: Sequence[Step]) -> list[str]:
    return [step.name for step in steps[:3]] + ["...", steps[-1].name]


def _plan_size(size: str, loaded: dict[str, RunConfig]) -> Iterator[Step]:
    families = [family for family in FAMILIES if f"-{size}-" in family]
    first = families[0]
    for bits in (16, 8, 4):
        yield _memory_step(size, bits, loaded[f"{first}-ner"])
    for task in TASKS:
        config = loaded[f"{first}-{task}"]
        yield _evaluate(dataclasses.replace(config, name=f"llama-{size}-base-{task}"), of_adapter=False)
    for family in families:
        for task in TASKS:
            yield from _train_and_evaluate(loaded[f"{family}-{task}"])
        if size == "8b":
            for name, tasks in TOGETHER.items():
                yield from _train_and_evaluate(
                    _join(f"{family}-{name}", [loaded[f"{family}-{task}"] for task in tasks])
                )


def _train_and_evaluate(config: RunConfig) -> Iterator[Step]:
    yield Step(name=f"{config.name}-train", kind="train", config=config, of_adapter=True)
    yield _evaluate(config, of_adapter=True)


def _evaluate(config: RunConfig, *, of_adapter: bool) -> Step:
    return Step(name=f"{config.name}-evaluate", kind="evaluate", config=config, of_adapter=of_adapter)


def _memory_step(size: str, bits: Bits, config: RunConfig) -> Step:
    """Return the step that measures inference memory at batch 1, as in the paper's table of models."""
    few = min(config.data.max_test_examples or _NUM_MEMORY_EXAMPLES, _NUM_MEMORY_EXAMPLES)
    own = dataclasses.replace(
        config,
        name=f"llama-{size}-memory-{bits}bit",
        data=dataclasses.replace(config.data, max_test_examples=few),
        eval=dataclasses.replace(config.eval, bits=bits, batch_size=1),
    )
    return _evaluate(own, of_adapter=False)


def _join(name: str, configs: Sequence[RunConfig]) -> RunConfig:
    tasks = tuple(task for config in configs for task in config.data.tasks)
    first = configs[0]
    return dataclasses.replace(first, name=name, data=dataclasses.replace(first.data, tasks=tasks))
