"""Inputs of beside_peft.py's sides, written by FinLoRA's encoder, and the numbers that the sides leave behind."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finlora.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from finlora.configfile import load_config
from finlora.data.encode import end_token_id
from finlora.data.sets.prepared import read_prepared
from finlora.errors import ConfigError
from finlora.evaluate.evaluation import Work, encode_split
from finlora.evaluate.metrics import score_answers
from finlora.formula.low_rank import peft_settings
from finlora.precision import is_autocast, resolve_training
from finlora.results import read_results
from finlora.train.path import make_sampler
from finlora.train.run.run_folder import RunFolder, TrainingSet, load_training_set, resolve_paths
from finlora.train.steps.loop import count_steps

_ENCODING = threading.Lock()
"""The variants of a task wait for one encoding."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One adapter."""

    task: str
    """Task of the config's name."""
    variant: str
    """`4bit-r4`."""
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.variant}-seed{self.seed}"

    def tree(self, options: argparse.Namespace) -> dict[str, Any]:
        """Return what identifies the row's record."""
        own = {"task": self.task, "variant": self.variant, "seed": self.seed}
        return own | {"settings": sorted(options.settings), "device": options.device}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A row that is ready to run."""

    yaml: Path
    overrides: Sequence[str]
    """Settings of FinLoRA's commands over the YAML."""
    config: RunConfig
    works: Sequence[Work]
    """Test splits."""
    folder: Path
    """Of the row: logs and both sides' files."""

    @property
    def run(self) -> RunFolder:
        """FinLoRA's run folder."""
        return RunFolder(Path(self.config.output_dir) / self.config.name)

    @property
    def plain(self) -> Path:
        """Folder of the plain side."""
        return self.folder / "plain"


def make_job(row: Row, options: argparse.Namespace, yaml: Path, folder: Path, share: float) -> Job:
    """Resolve a row's settings, and write the plain side's inputs.

    Args:
        folder: of the row.
        share: of a GPU, for each process.

    Raises:
        ConfigError: the plain side does not have a setting.
        FinloraError: base or data cannot be used.
    """
    bits, _, rank = row.variant.partition("bit-r")
    overrides = [
        *(f"name={row.name}", f"output_dir={folder / 'finlora'}", f"seed={row.seed}"),
        *(f"model.base={options.base}", f"model.bits={bits}", f"lora.rank={rank}", f"data.dir={options.data}"),
        *(f"train.device={options.device}", f"eval.device={options.device}"),
        *((f"train.gpus_per_worker={share}", f"eval.num_gpus={share}") if share < 1 else ()),
        *options.settings,
    ]
    # On a CPU the number type is measured: once here, so that all processes take the same.
    config = resolve_training(resolve_paths(load_config(yaml, overrides)))
    overrides += [f"model.compute_dtype={config.model.compute_dtype}", f"train.precision={config.train.precision}"]
    _require_plain(config)
    with _ENCODING:
        model = dataclasses.replace(config.model, bits=16)
        seed = config.seed if config.data.max_train_examples else 0
        training_set, works = _encode(model, config.data, config.eval, seed)
    job = Job(yaml=yaml, overrides=overrides, config=config, works=works, folder=folder)
    job.plain.mkdir(parents=True)
    (job.plain / "inputs.json").write_text(json.dumps(make_inputs(config, training_set, works)), encoding="utf-8")
    return job


def make_inputs(config: RunConfig, training_set: TrainingSet, works: Sequence[Work]) -> dict[str, Any]:
    """Return what the plain side reads: token ids, the order of the examples, and the settings."""
    examples, train, optim = training_set.encoded, config.train, config.optim
    sampler = make_sampler(config, examples)
    total_steps = count_steps(sampler, train.epochs, train.max_steps)
    steps = list(sampler.batches(total_steps))
    longest = max(item.num_tokens for item in examples)
    micro_batch = _choose_micro_batch(train.global_batch_size, longest, train.max_pack_tokens)
    tokenizer, source = training_set.base.tokenizer, training_set.base.source
    lora = config.lora
    return {
        "base": config.model.base,
        "tokenizer": str(source.tokenizer_path),
        "pad_token_id": tokenizer.pad_token_id,
        "end_token_id": end_token_id(tokenizer, config.model.template),
        "device": "cuda:0" if train.device == "cuda" else "cpu",
        "dtype": config.model.compute_dtype,
        "bits": config.model.bits,
        "lora": peft_settings(lora.settings, lora.dropout),
        "training": {
            "seed": config.seed,
            "is_autocast": is_autocast(config),
            "total_steps": total_steps,
            "num_warm_up": math.ceil(optim.warmup_ratio * total_steps),
            "learning_rate": optim.learning_rate,
            "betas": [optim.beta1, optim.beta2],
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
            "max_grad_norm": optim.max_grad_norm,
            "micro_batch": micro_batch,
            "accumulation": -(-train.global_batch_size // micro_batch),
            "log_every_steps": train.log_every_steps,
            "checkpoint_every_steps": train.checkpoint_every_steps,
        },
        "examples": [[item.prompt_ids, item.answer_ids] for item in examples],
        "order": _split_epochs(steps, sampler.steps_per_epoch),
        "evaluation": {
            "bits": config.eval.bits or config.model.bits,
            "batch_size": config.eval.batch_size,
            "max_new_tokens": config.eval.max_new_tokens,
        },
        "questions": {work.task: _list_questions(work, config) for work in works},
    }


def read_finlora(job: Job) -> dict[str, Any]:
    """Return the numbers that FinLoRA's commands recorded."""
    results = read_results(job.run.results)
    (training,) = (result for result in results if result.kind == "training")
    evaluations = [result for result in results if result.kind == "evaluation"]
    return {
        "scores": {each.task: _shorten(each.metrics, each.num_examples) for each in evaluations},
        "scoring_s": sum(each.wall_seconds or 0.0 for each in evaluations),
        "train_peak_gib": training.peak_memory_gib,
        "evaluate_peak_gib": max(each.peak_memory_gib or 0.0 for each in evaluations),
        "loss_last": training.metrics["loss_last"],
    }


def read_plain(job: Job) -> dict[str, Any]:
    """Return the plain side's numbers, its answers judged as FinLoRA's."""
    training, answers = (
        json.loads((job.plain / name).read_text(encoding="utf-8")) for name in ("training.json", "answers.json")
    )
    scores = {}
    for work in job.works:
        own = answers["tasks"][work.task]
        texts = own.get("texts") or [
            example.choices[max(range(len(row)), key=row.__getitem__)]
            for example, row in zip(work.examples, own["log_probs"], strict=True)
        ]
        metrics = score_answers(texts, work.examples, seed=job.config.seed).metrics
        scores[work.task] = _shorten(metrics, len(texts))
    return {
        "scores": scores,
        "scoring_s": sum(own["seconds"] for own in answers["tasks"].values()),
        "train_peak_gib": training["peak_gib"],
        "evaluate_peak_gib": answers["peak_gib"],
        "loss_last": training["losses"][-1] if training["losses"] else None,
    }


def _require_plain(config: RunConfig) -> None:
    """Refuse settings that the plain side does not have."""
    optim, train = config.optim, config.train
    needed = [
        ("optim.name", optim.name, "adamw"),
        ("optim.schedule", optim.schedule, "linear"),
        ("train.num_workers", train.num_workers, 1),
        ("eval.num_stages", config.eval.num_stages, 1),
        ("model.weights", config.model.weights, "pretrained"),
    ]
    faults = [
        f"{key}={found}: expected {wanted}, as plain_peft.py has" for key, found, wanted in needed if found != wanted
    ]
    if faults:
        raise ConfigError(faults)


@lru_cache(maxsize=2)
def _encode(model: ModelConfig, data: DataConfig, scoring: EvalConfig, seed: int) -> tuple[TrainingSet, list[Work]]:
    """Read and encode both splits of a config's tasks.

    Args:
        seed: samples data.max_train_examples.
    """
    config = RunConfig(model=model, data=data, eval=scoring, seed=seed)
    training_set = load_training_set(config)
    if any(item.weight != 1 for item in training_set.encoded):
        raise ConfigError("some examples have a weight: expected none, since plain_peft.py trains without weights")
    tokenizer, date = training_set.base.tokenizer, training_set.template_date
    splits = [read_prepared(Path(data.dir), task, "test") for task in data.tasks]
    return training_set, [encode_split(config, tokenizer, split, split.task, date) for split in splits]


def _list_questions(work: Work, config: RunConfig) -> list[dict[str, Any]]:
    is_scored = config.eval.method == "labels"
    return [
        {"prompt": item.prompt_ids, "choices": [work.choice_ids[choice] for choice in example.choices if is_scored]}
        for example, item in zip(work.examples, work.encoded, strict=True)
    ]


def _choose_micro_batch(batch: int, longest: int, max_tokens: int) -> int:
    """Return the examples of a padded pass: a batch halved until its longest rows are within the tokens of a pack."""
    while batch > 1 and batch * longest > max_tokens:
        batch = -(-batch // 2)
    return batch


def _split_epochs(steps: Sequence[list[int]], steps_per_epoch: int) -> list[list[list[int]]]:
    """Return the batches of each epoch; a last one that is cut short is left with what is there."""
    return [list(steps[start : start + steps_per_epoch]) for start in range(0, len(steps), steps_per_epoch)]


def _shorten(metrics: dict[str, float], num_examples: int) -> dict[str, float]:
    """Return a task's accuracy with its 95 % interval, and the number of its test examples."""
    return {
        "accuracy": metrics["accuracy"],
        "low": metrics["accuracy_low"],
        "high": metrics["accuracy_high"],
        "num_examples": num_examples,
    }
