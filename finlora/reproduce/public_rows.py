"""The paper's rows on a public base, SmolLM2-135M-Instruct, which `make demo BASE=real` makes without a model hub.

One YAML for each task, of the 4-bit adapter with rank 4. The 8-bit and the 16-bit adapter with rank 8 differ from it by these two
numbers alone. NWGI has no training rows: it is scored by the base, and by the adapter of several tasks, which never saw it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from finlora.config import Bits, RunConfig
from finlora.reproduce.step import Step, evaluate, memory_step, train_and_evaluate, with_seed, with_tasks

SIZE = "135m"
NAME = f"smollm2-{SIZE}"
FAMILY = f"{NAME}-4bit-r4"
"""Start of the YAML files' names."""
TASKS = ("fpb", "fiqa", "fiqa-clean", "tfns", "headline", "ner", "formulas", "xbrl")
TOGETHER = "classification"
"""Row of one adapter for the classification tasks."""
ROWS = tuple(f"{FAMILY}-{task}" for task in (*TASKS, TOGETHER))
VARIANTS: tuple[tuple[Bits, int], ...] = ((4, 4), (8, 8), (16, 8))
"""Bits of the base and rank of its adapter."""
_BITS: tuple[Bits, ...] = (8, 16, 4)
"""Of the base that is scored. 8 first: the paper scores at 8 bit."""


def plan_public(
    load: Callable[[str, Sequence[str]], RunConfig], seeds: Sequence[int], identify: Callable[[RunConfig], str]
) -> Iterator[Step]:
    """Return the steps in order: base at each number of bits, then the adapters of each seed.

    Args:
        load: config of a YAML's name and `key=value` texts.
        seeds: a run of each adapter row for each; none: one run with the config's seed.
        identify: `identify_base` of a config's base.
    """
    alone = {task: load(f"{FAMILY}-{task}", []) for task in TASKS}
    base_id = identify(alone["fpb"])
    nwgi = with_tasks(alone["fpb"], f"{NAME}-nwgi", ["nwgi"])
    for bits in _BITS:
        yield memory_step(NAME, bits, alone["ner"], base_id)
    for bits in _BITS:
        for task, config in {**alone, "nwgi": nwgi}.items():
            scoring = dataclasses.replace(config.eval, bits=bits)
            scored = dataclasses.replace(config, name=f"{NAME}-base-{bits}bit-{task}", eval=scoring)
            yield evaluate(scored, base_id, of_adapter=False)
    for seed in seeds or (None,):
        for bits, rank in VARIANTS:
            for task in (*TASKS, TOGETHER):
                name = f"{NAME}-{bits}bit-r{rank}-{task}"
                changes = [f"name={name}", f"model.bits={bits}", f"lora.rank={rank}"]
                config = with_seed(load(f"{FAMILY}-{task}", changes), seed)
                yield from train_and_evaluate(config, base_id)
                if task == TOGETHER:
                    yield dataclasses.replace(
                        evaluate(with_tasks(config, config.name, ["nwgi"]), base_id, of_adapter=True),
                        name=f"{config.name}-nwgi-evaluate",
                    )
