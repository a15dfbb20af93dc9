"""Resolution of the settings `model.compute_dtype: auto` and `train.precision: auto` into number types.

On a GPU auto is bfloat16. On a CPU it is what the processor multiplies faster (machine/cpu.py). A run's driver resolves it
once, before anything is forecast, and records it in the run's config.yaml: workers on other nodes and a resumed run take that.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from finlora.config import ModelConfig, RunConfig
from finlora.machine.cpu import Dtype, choose_dtype
from finlora.yamltext import read_yaml

AUTO = "auto"
Precision = Literal["auto", "bf16", "fp32"]
_SHORT: dict[str, Precision] = {"bfloat16": "bf16", "float32": "fp32"}
_BYTES = {"bfloat16": 2, "float32": 4}


def resolve_model(model: ModelConfig, device: str) -> ModelConfig:
    """Return the settings with a compute type for a device (`cuda` or `cpu`); a set one stays."""
    if model.compute_dtype != AUTO:
        return model
    return dataclasses.replace(model, compute_dtype=choose(device))


def resolve_evaluation(config: RunConfig) -> RunConfig:
    """Return a config with a compute type for eval.device."""
    return dataclasses.replace(config, model=resolve_model(config.model, config.eval.device))


def resolve_training(config: RunConfig, record: Path | None = None) -> RunConfig:
    """Return a config with a compute type and a precision for train.device.

    Args:
        record: config file that the same run or search wrote at its start; it decides what auto becomes. May be None,
            missing or unreadable.
    """
    if AUTO not in (config.model.compute_dtype, config.train.precision):
        return config
    recorded = _read_record(record)
    chosen = choose(config.train.device)
    model, train = config.model, config.train
    if model.compute_dtype == AUTO:
        model = dataclasses.replace(model, compute_dtype=recorded.get("compute_dtype", chosen))
    if train.precision == AUTO:
        train = dataclasses.replace(train, precision=recorded.get("precision", _SHORT[chosen]))
    return dataclasses.replace(config, model=model, train=train)


def resolve_precision(precision: Precision, device: str) -> Precision:
    """Return the autocast precision for a device; a set one stays."""
    return _SHORT[choose(device)] if precision == AUTO else precision


def choose(device: str) -> Dtype:
    """Return the type that auto means on a device."""
    return "bfloat16" if device == "cuda" else choose_dtype().dtype


def describe_type(model: ModelConfig, device: str) -> str:
    """Describe a device's compute type, with the reason if the processor decided it."""
    if model.compute_dtype != AUTO or device == "cuda":
        return resolve_model(model, device).compute_dtype
    return "{}: {}".format(*choose_dtype())


def describe_choice(config: RunConfig, resolved: RunConfig) -> str | None:
    """Describe in a line the type that auto became on a CPU, and why; None if the processor decided nothing."""
    asked = (config.model.compute_dtype, config.train.precision)
    if config.train.device != "cpu" or AUTO not in asked:
        return None
    dtype, reason = choose_dtype()
    found = (resolved.model.compute_dtype, resolved.train.precision)
    if any(was == AUTO and now not in (dtype, _SHORT[dtype]) for was, now in zip(asked, found, strict=True)):
        return (
            f"Computes in {found[0]}, autocast {found[1]}, as when the run started; on this machine: {dtype}, {reason}."
        )
    return describe_cpu()


def describe_cpu() -> str:
    """Describe the type that auto means on this processor, and why."""
    return "Computes in {}: {}.".format(*choose_dtype())


def count_bytes(config: RunConfig) -> int:
    """Return the bytes of a weight or activation in the compute type of training."""
    return _BYTES[resolve_training(config).model.compute_dtype]


def is_autocast(config: RunConfig) -> bool:
    """Return whether training runs under bfloat16 autocast."""
    return resolve_training(config).train.precision == "bf16"


def _read_record(record: Path | None) -> dict[str, Any]:
    """Return the types that a run or search recorded; whoever opens the record refuses an unreadable one."""
    if record is None:
        return {}
    try:
        tree = read_yaml(record)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    found = {}
    for section, key, allowed in (("model", "compute_dtype", get_args(Dtype)), ("train", "precision", _SHORT.values())):
        values = tree.get(section) if isinstance(tree, dict) else None
        if isinstance(values, dict) and values.get(key) in allowed:
            found[key] = values[key]
    return found
