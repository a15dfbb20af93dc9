"""Steps of the paper's reproduction, made from one config for each row of its tables. No Ray here.

Cheap steps come first: 8B bases, their adapters, then 70B. Two additions are future work in the paper: formula questions over
XBRL (generated, as the published questions are not available) and, at 8B, adapters of several tasks: one for the four sentiment
tasks, one for all six classification tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

from finlora.config import RunConfig
from finlora.configfile import load_config
from finlora.errors import ConfigError
from finlora.precision import resolve_training
from finlora.reproduce import public_rows
from finlora.reproduce.public_rows import plan_public
from finlora.reproduce.step import (
    Step,
    evaluate,
    identify_base,
    memory_step,
    train_and_evaluate,
    with_seed,
    with_tasks,
)
from finlora.train.run.run_folder import resolve_paths

FAMILIES = ("llama-8b-4bit-r4", "llama-8b-8bit-r8", "llama-70b-4bit-r4")
PAPER_TASKS = ("fpb", "fiqa", "tfns", "nwgi", "headline", "ner", "xbrl")
TASKS = (*PAPER_TASKS, "formulas")
TOGETHER = {
    "sentiment": ("fpb", "fiqa", "tfns", "nwgi"),
    "classification": ("fpb", "fiqa", "tfns", "nwgi", "ner", "headline"),
}
"""Row of an adapter for several tasks -> its tasks."""
SIZES = ("8b", "70b")


def make_plan(
    configs: Path,
    output: Path,
    overrides: Sequence[str],
    only: str = "*",
    bases: Mapping[str, str] | None = None,
    seeds: Sequence[int] = (),
) -> list[Step]:
    """Return the steps of the whole reproduction in order.

    Args:
        configs: folder with one YAML for each row, as jobs/configs.
        output: folder of the reproduction; runs go below it.
        overrides: `key=value` texts for every row, as train.num_workers=1.
        only: pattern of step names, such as `*8b*ner*`.
        bases: size, `135m`, `8b` or `70b`, -> model.base of its rows. With `135m` only the sizes that it names are planned;
            otherwise both Llamas are, and sizes that it does not name keep the base of their config.
        seeds: a run of each adapter row for each; none: one run with the config's seed.

    Raises:
        ConfigError: a row has no config, a setting is wrong, or the pattern matches no step.
    """
    bases = bases or {}
    sizes = [size for size in (public_rows.SIZE, *SIZES) if size in bases] if public_rows.SIZE in bases else SIZES
    rows = [row for size in sizes for row in _rows(size)]
    missing = [row for row in rows if not (configs / f"{row}.yaml").is_file()]
    if missing:
        raise ConfigError(
            f"{configs} lacks {len(missing)} of {len(rows)} rows ({missing[0]}.yaml, ...): give --configs the "
            "folder jobs/configs of FinLoRA's sources."
        )

    def load(row: str, own: Sequence[str] = ()) -> RunConfig:
        base = bases.get(row.split("-")[1])
        values = [*overrides, f"output_dir={output / 'runs'}", *([f"model.base={base}"] if base else []), *own]
        return resolve_training(resolve_paths(load_config(configs / f"{row}.yaml", values)))

    known: dict[tuple[str, str], str] = {}

    def identify(config: RunConfig) -> str:
        key = (config.model.base, config.model.weights)
        if key not in known:
            known[key] = identify_base(config.model)
        return known[key]

    steps: list[Step] = []
    for size in sizes:
        if size == public_rows.SIZE:
            steps += plan_public(load, seeds, identify)
        else:
            loaded = {row: load(row) for row in _rows(size)}
            steps += _plan_size(size, loaded, identify(loaded[_rows(size)[0]]), seeds)
    chosen = [step for step in steps if fnmatch(step.name, only)]
    if not chosen:
        raise ConfigError(
            f"--only {only!r} matches none of {len(steps)} steps: their names are {', '.join(_brief(steps))}."
        )
    return chosen


def _rows(size: str) -> list[str]:
    if size == public_rows.SIZE:
        return list(public_rows.ROWS)
    return [f"{family}-{task}" for family in FAMILIES if f"-{size}-" in family for task in TASKS]


def _brief(steps: Sequence[Step]) -> list[str]:
    return [step.name for step in steps[:3]] + ["...", steps[-1].name]


def _plan_size(size: str, loaded: dict[str, RunConfig], base_id: str, seeds: Sequence[int]) -> Iterator[Step]:
    families = [family for family in FAMILIES if f"-{size}-" in family]
    first = families[0]
    for bits in (16, 8, 4):
        yield memory_step(f"llama-{size}", bits, loaded[f"{first}-ner"], base_id)
    for task in TASKS:
        config = loaded[f"{first}-{task}"]
        yield evaluate(with_tasks(config, f"llama-{size}-base-{task}", config.data.tasks), base_id, of_adapter=False)
    for seed in seeds or (None,):
        for family in families:
            for task in TASKS:
                yield from train_and_evaluate(with_seed(loaded[f"{family}-{task}"], seed), base_id)
            if size == "8b":
                for name, tasks in TOGETHER.items():
                    joined = _join(f"{family}-{name}", [loaded[f"{family}-{task}"] for task in tasks])
                    yield from train_and_evaluate(with_seed(joined, seed), base_id)


def _join(name: str, configs: Sequence[RunConfig]) -> RunConfig:
    return with_tasks(configs[0], name, [task for config in configs for task in config.data.tasks])
