"""Evaluate a base or an adapter on prepared test splits, on any engine."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from finlora.config import RunConfig
from finlora.configfile import config_to_tree
from finlora.data.encode import Encoded, encode_answer, encode_examples
from finlora.data.example import Example
from finlora.data.prepared import PreparedSplit, read_prepared
from finlora.engine.local import LocalEngine
from finlora.engine.protocol import Engine
from finlora.evaluate.metrics import score_answers
from finlora.model.base import BaseModel, check_device, load_base, quiet_bitsandbytes
from finlora.model.contract import read_contract
from finlora.model.lora import load_adapter
from finlora.model.source import find_source
from finlora.results import Result, describe_environment

OnProgress = Callable[[str, int, int], None]
"""Called with the task, examples done and examples in all."""


def run_evaluation(config: RunConfig, adapter: Path | None, on_progress: OnProgress) -> list[Result]:
    """Evaluate every task of the config on this process's device.

    Args:
        config: with absolute paths. Test splits are read and checked before the model is loaded.
        adapter: adapter folder, or None for the base alone.

    Raises:
        DatasetError: a test split is missing, damaged, or an example is too long.
        AdapterError: the adapter is incomplete or was made for another base, tokenizer or template.
        ResourceError: the device is not there.
    """
    device = torch.device("cuda:0" if config.eval.device == "cuda" else "cpu")
    check_device(device)
    splits = [read_prepared(Path(config.data.dir), task, "test") for task in config.data.tasks]
    contract = read_contract(adapter) if adapter else None
    bits = config.eval.bits or config.model.bits
    with quiet_bitsandbytes():
        base = load_base(config.model, bits, device, config.seed)
        model = base.model
        variant = "base"
        if adapter and contract:
            contract.check(adapter, base, config.model.template)
            model = load_adapter(base.model, adapter)
            variant = contract.variant
        engine = LocalEngine(model, base.tokenizer, config.model.template, device)
        return [
            dataclasses.replace(
                _evaluate_task(config, engine, base, split, task, device, on_progress),
                variant=variant,
                adapter=str(adapter) if adapter else None,
                adapter_mib=contract.adapter_mib if contract else None,
            )
            for task, split in zip(config.data.tasks, splits, strict=True)
        ]


def check_evaluation(config: RunConfig, adapter: Path | None) -> str:
    """Check that test splits and adapter are there, before any GPU is taken; returns the plan in words.

    Raises:
        DatasetError: a test split is missing or damaged.
        AdapterError: the adapter folder is missing or incomplete.
        ModelError: the base's files are not usable.
    """
    find_source(config.model)
    counts = [
        f"{task} {len(read_prepared(Path(config.data.dir), task, 'test').examples):,}" for task in config.data.tasks
    ]
    subject = "the base model" if adapter is None else f"adapter {read_contract(adapter).variant} of {adapter}"
    limit = f", the first {config.data.max_test_examples} of each" if config.data.max_test_examples else ""
    return (
        f"Evaluating {subject} on {config.model.base} at {config.eval.bits or config.model.bits} bit "
        f"({config.eval.device}): test examples {', '.join(counts)}{limit}"
    )


def answer_examples(
    engine: Engine,
    base: BaseModel,
    examples: Sequence[Example],
    encoded: Sequence[Encoded],
    config: RunConfig,
    on_progress: Callable[[int], None],
) -> tuple[list[str], str]:
    """Ask the engine for the answer to each example, longest first so that batches pad little.

    Returns:
        The answers in the order of the examples, and the method: `labels`, `generate`, or both for a mixed set.
    """
    scored = [index for index, item in enumerate(examples) if _is_scored(item, config)]
    generated = sorted(set(range(len(examples))) - set(scored))
    choice_ids = {
        choice: encode_answer(choice, base.tokenizer, config.model.template)
        for choice in sorted({choice for index in scored for choice in examples[index].choices})
    }
    answers = [""] * len(examples)
    num_done = 0
    for group in (scored, generated):
        by_length = sorted(group, key=lambda index: -len(encoded[index].prompt_ids))
        for start in range(0, len(by_length), config.eval.batch_size):
            indices = by_length[start : start + config.eval.batch_size]
            prompts = [encoded[index].prompt_ids for index in indices]
            if group is scored:
                choices = [examples[index].choices for index in indices]
                scores = engine.score_choices(prompts, [[choice_ids[c] for c in own] for own in choices])
                texts = [
                    own[max(range(len(own)), key=row.__getitem__)] for own, row in zip(choices, scores, strict=True)
                ]
            else:
                texts = engine.generate(prompts, config.eval.max_new_tokens)
            for index, text in zip(indices, texts, strict=True):
                answers[index] = text
            num_done += len(indices)
            on_progress(num_done)
    used = [name for name, group in (("labels", scored), ("generate", generated)) if group]
    return answers, "+".join(used)


def _evaluate_task(
    config: RunConfig,
    engine: Engine,
    base: BaseModel,
    split: PreparedSplit,
    task: str,
    device: torch.device,
    on_progress: OnProgress,
) -> Result:
    limit = config.data.max_test_examples
    examples = list(split.examples[:limit])
    encoded, kept = encode_examples(
        examples,
        base.tokenizer,
        template=config.model.template,
        max_seq_len=config.model.max_seq_len,
        too_long=config.data.too_long,
        reserve=[0 if _is_scored(item, config) else config.eval.max_new_tokens for item in examples],
    )
    examples = [examples[index] for index in kept]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    answers, method = answer_examples(
        engine, base, examples, encoded, config, lambda done: on_progress(task, done, len(examples))
    )
    seconds = time.perf_counter() - started
    scores = score_answers(answers, examples, seed=config.seed)
    num_tokens = sum(len(item.prompt_ids) for item in encoded)
    return Result(
        kind="evaluation",
        task=task,
        variant="base",
        base=config.model.base,
        bits=base.bits,
        method=method,
        num_examples=len(examples),
        is_partial=len(examples) < len(split.examples),
        metrics=scores.metrics,
        counts=scores.confusion,
        seconds_per_example=seconds / len(examples),
        tokens_per_second=num_tokens / seconds,
        wall_seconds=seconds,
        gpu_hours=seconds / 3600 if device.type == "cuda" else None,
        peak_memory_gib=_peak_memory_gib(device),
        data_hash=split.hash,
        config=config_to_tree(config),
        environment=describe_environment(),
    )


def _is_scored(example: Example, config: RunConfig) -> bool:
    """Return whether the answer is chosen among the example's labels; free text is generated whatever the method."""
    return bool(example.choices) and config.eval.method == "labels"


def _peak_memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
