"""LoRA's update W0 + (alpha / rank) B A, described once: its scale, its tensors, and their names and settings in PEFT's files.

A variant of LoRA changes its settings, names or shapes here, for training, merge, stages, memory forecast and the check of
adapter files alike. What the record does not describe is refused by all of them (`foreign_settings`).

Shapes: rank r, in K, out N of a projection.
Source: LoRA, arXiv:2106.09685, section 4.1; PEFT's LoraConfig.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from finlora.formula.llama import (
    PRODUCTS,
    PROJECTION_NAMES,
    LlamaShape,
    Projection,
    find_projection,
    product_columns,
)

if TYPE_CHECKING:
    from torch import Tensor

MAX_RANK = 4096
"""Larger ranks are refused in settings and in adapter files, since a file's rank decides how much memory is allocated."""
MAX_ALPHA = 1e9
"""This alpha and larger ones are refused in settings and in adapter files: such an update would drown the base's weights."""
_ADAPTER = "default"
"""PEFT's name of the only adapter of a model."""
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", None),
    "init_lora_weights": (True,),
}
"""PEFT's settings that must have one of these values."""
_WITHOUT_EFFECT = {
    *("r", "lora_alpha", "target_modules", "lora_dropout", "inference_mode", "peft_version"),
    *("base_model_name_or_path", "revision", "megatron_core", "qalora_group_size"),
}
"""PEFT's settings that `LoraSettings` holds, and those without effect: nothing reads them, or only together with a setting that
must be empty. Every other setting changes the formula, so it must be empty."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What decides the update of a projection, apart from the values of A and B."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


@dataclass(frozen=True, slots=True)
class Update:
    """LoRA on one projection: scale * (x A^T) B^T, added to its columns of a product."""

    columns: slice
    """Of the product that the projection belongs to."""
    down: Tensor
    """A (r, K): a float32 parameter in training, in the type of the activations in a stage."""
    up: Tensor
    """B (N, r)."""
    scale: float


class UpdateNames(NamedTuple):
    """Names of A and B in PEFT's adapter file."""

    down: str
    up: str


class UpdateSite(NamedTuple):
    """Where a base takes an update."""

    layer: int
    projection: Projection
    columns: slice
    """Of the projection's product."""
    names: UpdateNames


def peft_settings(*, rank: int, alpha: float, dropout: float, target_modules: Sequence[str]) -> dict[str, Any]:
    """Return the arguments of PEFT's LoraConfig."""
    return {
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": list(target_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def foreign_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of PEFT's settings that need another formula than (alpha / rank) B A."""
    odd = {key: values.get(key) for key, plain in _PLAIN.items() if not _is_among(values.get(key), plain)}
    return odd | {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT | _PLAIN.keys() and value}


def read_settings(values: Mapping[str, Any]) -> LoraSettings | None:
    """Read PEFT's settings; None unless they hold a rank of 1 to MAX_RANK, a positive alpha and names of projections."""
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        return None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha < MAX_ALPHA:
        return None
    if not isinstance(targets, list | set) or not all(isinstance(name, str) for name in targets):
        return None
    if not set(targets).issubset(PROJECTION_NAMES):
        return None
    return LoraSettings(rank=rank, alpha=float(alpha), target_modules=tuple(targets))


def count_sizes(size: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B of a projection (out, in)."""
    num_out, num_in = size
    return (rank, num_in), (num_out, rank)


def update_names(projection: Projection, layer: int) -> UpdateNames:
    """Return the names of a projection's A and B in PEFT's adapter file."""
    prefix = f"base_model.model.{projection.path(layer)}"
    return UpdateNames(f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight")


def rank_axis(name: str) -> int | None:
    """Return the axis of the rank in a tensor of PEFT's adapter file; None where it is neither A nor B."""
    return {"lora_A.weight": 0, "lora_B.weight": 1}.get(".".join(name.split(".")[-2:]))


def list_adapter_tensors(
    shape: LlamaShape, rank: int, target_modules: Sequence[str]
) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield name and shape of each tensor of an adapter file: A, B, A, B, ..."""
    for layer in range(shape.num_layers):
        for target in target_modules:
            projection = find_projection(target)
            yield from zip(update_names(projection, layer), count_sizes(projection.size(shape), rank), strict=True)


def list_sites(shape: LlamaShape, target_modules: Sequence[str]) -> Iterator[UpdateSite]:
    """Yield the sites of an adapter's updates, layer by layer in the order of PROJECTIONS."""
    for layer in range(shape.num_layers):
        for product in PRODUCTS:
            for projection, columns in product_columns(product, shape):
                if projection.name in target_modules:
                    yield UpdateSite(layer, projection, columns, update_names(projection, layer))


def read_module(module: Any, columns: slice, scale: float) -> Update:
    """Return the update that PEFT's layer of a projection holds; it shares the parameters."""
    return Update(columns, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight, scale)


def read_dropout(module: Any) -> float:
    """Return the dropout of PEFT's layer of a projection."""
    return float(getattr(module.lora_dropout[_ADAPTER], "p", 0.0))


def _is_among(value: object, plain: tuple[object, ...]) -> bool:
    return any(value is one or (isinstance(value, str) and value == one) for one in plain)
