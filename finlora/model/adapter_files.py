"""The files of an adapter folder, checked before anything acts on them: they may come from someone who means harm.

PEFT imports a module that `adapter_config.json` names (megatron_core), takes regular expressions from it, and makes tensors of
whatever rank it says; so the settings must be plain LoRA's, and the weights' header must agree with them, before PEFT or a stage
of the engine sees the folder.

Shapes: rank r, in K, out N of a projection.
"""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finlora.config import LLAMA_PROJECTIONS
from finlora.configfile import show
from finlora.errors import AdapterError

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"

_MAX_CONFIG_BYTES = 2**18
_MAX_WEIGHTS_BYTES = 8 * 2**30
_MAX_RANK = 4096
_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "task_type": ("CAUSAL_LM", None), "init_lora_weights": (True,)}
# Read by nobody, or only beside a setting that must be empty. Every other setting changes the formula, so it must be empty.
_WITHOUT_EFFECT = (
    *("r", "lora_alpha", "target_modules", "lora_dropout", "inference_mode", "peft_version"),
    *("base_model_name_or_path", "revision", "megatron_core", "qalora_group_size"),
)
_DTYPES = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What `adapter_config.json` says of a plain LoRA."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def check_file(path: Path, max_bytes: int) -> None:
    """Refuse what is no file of the folder itself: a pipe would block, a link could show what lies elsewhere.

    The folder may be reached through a link, as a mounted one is; links within it are followed.

    Raises:
        AdapterError: says what was found.
    """
    folder = path.parent
    try:
        facts = path.stat()
        is_inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise AdapterError(
            f"{folder} has no {path.name}: expected an adapter folder as `finlora train` writes it (RUN/adapter)."
        ) from error
    if not stat.S_ISREG(facts.st_mode) or not is_inside:
        found = "a link to a file outside of the folder" if stat.S_ISREG(facts.st_mode) else "no regular file"
        raise AdapterError(f"{path} is {found}: copy the adapter's own files.")
    if facts.st_size > max_bytes:
        raise AdapterError(f"{path} has {facts.st_size:,} bytes, more than {max_bytes:,}: it is no file of an adapter.")


def read_lora_settings(folder: Path) -> LoraSettings:
    """Read adapter_config.json of plain LoRA.

    Raises:
        AdapterError: it is missing or damaged, or has a setting that another formula than (alpha / rank) B A needs.
    """
    path = folder / ADAPTER_CONFIG
    check_file(path, _MAX_CONFIG_BYTES)
    try:
        values: Any = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no LoRA configuration ({type(error).__name__}): copy it again.") from error
    if not isinstance(values, dict):
        raise AdapterError(f"{path} holds a {type(values).__name__}: expected PEFT's settings. Copy it again.")
    odd = [f"{key}={show(values.get(key))}" for key, plain in _PLAIN.items() if not _is_among(values.get(key), plain)]
    odd += [f"{show(key)[1:-1]}={show(value)}" for key, value in values.items() if _changes_formula(key) and value]
    if odd:
        raise AdapterError(
            f"{path} is not plain LoRA ({', '.join(odd[:8])}): FinLoRA computes W0 + (alpha / rank) B A only. Train the adapter "
            "with `finlora train`, or use PEFT itself."
        )
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    is_rank = isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= _MAX_RANK
    is_alpha = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha < 1e9
    is_targets = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not (is_rank and is_alpha and is_targets and set(targets or ()).issubset(LLAMA_PROJECTIONS)):
        raise AdapterError(
            f"{path} has r={show(rank)}, lora_alpha={show(alpha)}, target_modules={show(targets)}: expected a rank of 1 to "
            f"{_MAX_RANK:,}, a positive number and some of {', '.join(LLAMA_PROJECTIONS)}."
        )
    assert isinstance(rank, int) and isinstance(alpha, int | float)  # noqa: PT018
    return LoraSettings(rank=rank, alpha=float(alpha), target_modules=tuple(targets or ()))


@contextmanager
def open_weights(folder: Path, settings: LoraSettings) -> Iterator[tuple[Any, Mapping[str, tuple[int, ...]]]]:
    """Open the adapter's safetensors file; yields it and the shape of each tensor. Nothing but the header is read.

    Raises:
        AdapterError: it is missing or not whole, or a tensor is no float matrix of the settings' rank.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / ADAPTER_WEIGHTS
    check_file(path, _MAX_WEIGHTS_BYTES)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            yield file, {name: _check_tensor(path, name, file.get_slice(name), settings) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise AdapterError(f"{path} is no whole safetensors file ({error}): copy the adapter again.") from error


def check_adapter(folder: Path) -> LoraSettings:
    """Look at everything that can be known of an adapter without its base: settings, shapes, and that all numbers are finite.

    Raises:
        AdapterError: says what is wrong.
    """
    settings = read_lora_settings(folder)
    with open_weights(folder, settings) as (file, shapes):
        for name in shapes:
            require_finite(file.get_tensor(name), folder, name)
    return settings


def require_finite(tensor: Any, folder: Path, name: str) -> None:
    """Refuse infinities and NaN, which would make every answer of the adapter a NaN.

    Raises:
        AdapterError: names the tensor.
    """
    if not bool(tensor.isfinite().all()):
        raise AdapterError(f"{folder} holds infinite numbers or NaN in {show(name)[1:-1]}: train the adapter again.")


def _check_tensor(path: Path, name: str, held: Any, settings: LoraSettings) -> tuple[int, ...]:
    shape, dtype = tuple(held.get_shape()), str(held.get_dtype())
    place = {"lora_A.weight": 0, "lora_B.weight": 1}.get(name[-13:])
    if place is None or len(shape) != 2 or shape[place] != settings.rank or dtype not in _DTYPES:
        raise AdapterError(
            f"{path} holds {show(name)[1:-1]} as {dtype} {list(shape)}: expected lora_A ({settings.rank}, in) and lora_B "
            f"(out, {settings.rank}) in floating point, for the rank that {ADAPTER_CONFIG} says."
        )
    return shape


def _changes_formula(key: str) -> bool:
    return key not in _WITHOUT_EFFECT and key not in _PLAIN


def _is_among(value: object, plain: tuple[object, ...]) -> bool:
    return any(value is one or (isinstance(value, str) and value == one) for one in plain)
