"""LoRA's update W0 + scale B A, described once: its scale, its tensors, and their names and settings in PEFT's files.

scale = alpha / rank, or alpha / sqrt(rank) with `rslora`. Rank and alpha may differ between projections. With `dora` the sum is
scaled row by row to learnt lengths m: m (W0 + scale B A) / ||W0 + scale B A||, where || || is the 2-norm of each row.

A variant of LoRA changes its settings, names or shapes here, for training, merge, stages, memory forecast and the check of
adapter files alike. What the record does not describe is refused by all of them (`foreign_settings`).

Shapes: rank r, in K, out N of a projection.
Source: LoRA, arXiv:2106.09685, section 4.1; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353, section 4; PEFT's LoraConfig.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

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
_MAGNITUDE = "lora_magnitude_vector"
"""PEFT's name of the row lengths of DoRA."""
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "task_type": ("CAUSAL_LM", None),
    "init_lora_weights": (True,),
}
"""PEFT's settings that must have one of these values."""
_WITHOUT_EFFECT = {
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    *("target_modules", "lora_dropout", "inference_mode", "peft_version"),
    *("base_model_name_or_path", "revision", "megatron_core", "qalora_group_size"),
}
"""PEFT's settings that `LoraSettings` holds, and those without effect: nothing reads them, or only together with a setting that
must be empty. Every other setting changes the formula, so it must be empty."""


_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga")
_REASONS = {
    "modules_to_save": "a trained embedding or head would be every request's, since the adapters of a batch share the base's",
    "bias": "trained biases would be every request's, since the adapters of a batch share the base's",
    "lora_bias": "an update with a bias is not W0 + scale B A",
}
"""PEFT's setting -> why no adapter may have it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSettings:
    """What decides the update of a projection, apart from the values of A and B."""

    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Projection -> its rank, where that is not `rank`."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False

    def rank_of(self, projection: str) -> int:
        return self.rank_pattern.get(projection, self.rank)

    def scale_of(self, projection: str) -> float:
        """Return the factor of B A on a projection."""
        rank, alpha = self.rank_of(projection), self.alpha_pattern.get(projection, self.alpha)
        return alpha / (rank**0.5 if self.rslora else rank)

    def widen(self) -> LoraSettings:
        """Return settings of twice the ranks and the same scales, for an update less the one that it began with."""
        factor = 2**0.5 if self.rslora else 2.0
        return dataclasses.replace(
            self,
            rank=2 * self.rank,
            alpha=factor * self.alpha,
            rank_pattern={name: 2 * rank for name, rank in self.rank_pattern.items()},
            alpha_pattern={name: factor * alpha for name, alpha in self.alpha_pattern.items()},
        )

    @property
    def ranks(self) -> list[int]:
        """Rank of each target, in their order."""
        return [self.rank_of(target) for target in self.target_modules]

    @property
    def variant(self) -> str:
        """What differs from plain LoRA of `rank` and `alpha`, such as `rsLoRA; down_proj rank 16`; empty: nothing."""
        parts = [name for name, is_on in (("DoRA", self.dora), ("rsLoRA", self.rslora)) if is_on]
        parts += [f"{name} rank {rank}" for name, rank in self.rank_pattern.items()]
        return "; ".join([*parts, *(f"{name} alpha {alpha:g}" for name, alpha in self.alpha_pattern.items())])


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
    gain: Tensor | None = None
    """DoRA in a stage: m / ||W0 + scale B A|| - 1 (N,), the part of the base's product to add to it. `up` has the factor."""


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


def peft_settings(settings: LoraSettings, dropout: float) -> dict[str, Any]:
    """Return the arguments of PEFT's LoraConfig."""
    return {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
        "rank_pattern": dict(settings.rank_pattern),
        "alpha_pattern": dict(settings.alpha_pattern),
        "lora_dropout": dropout,
        "target_modules": list(settings.target_modules),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }


def foreign_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of PEFT's settings that need another formula than this module's, or patterns that name no projection."""
    odd = {key: values.get(key) for key, plain in _PLAIN.items() if not _is_among(values.get(key), plain)}
    for key, is_right in _PATTERNS.items():
        if values.get(key) and not _is_pattern(values[key], is_right):
            odd[key] = values[key]
    odd |= {key: values[key] for key in ("use_rslora", "use_dora") if not isinstance(values.get(key), bool | None)}
    return odd | {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT | _PLAIN.keys() and value}


def explain_foreign(odd: Mapping[str, Any]) -> str:
    """Return why settings of `foreign_settings` are refused, and what to do; empty: nothing is known of them."""
    said = [words for key, words in _REASONS.items() if key in odd]
    start = odd.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_BASE):
        said.append(
            "its base lacks a part of the weights: have PEFT convert it to plain LoRA, by save_pretrained with "
            "path_initial_model_for_weight_conversion"
        )
    return "; ".join(said)


def read_settings(values: Mapping[str, Any]) -> LoraSettings | None:
    """Read PEFT's settings; None unless they hold a rank of 1 to MAX_RANK, a positive alpha and names of projections."""
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if not is_rank(rank) or not is_alpha(alpha):
        return None
    if not isinstance(targets, list | set) or not all(isinstance(name, str) for name in targets):
        return None
    if not set(targets).issubset(PROJECTION_NAMES):
        return None
    ranks, alphas = (
        {name: one for name, one in (values.get(key) or {}).items() if name in targets} for key in _PATTERNS
    )
    return LoraSettings(
        rank=rank,
        alpha=float(alpha),
        target_modules=tuple(targets),
        rslora=bool(values.get("use_rslora")),
        dora=bool(values.get("use_dora")),
        rank_pattern=ranks,
        alpha_pattern={name: float(one) for name, one in alphas.items()},
    )


def list_faults(settings: LoraSettings) -> Iterator[str]:
    """Yield what is wrong with settings of the user, each with the name of its field."""
    rank, alpha, targets = settings.rank, settings.alpha, settings.target_modules
    if not is_rank(rank):
        yield f"rank={rank}: expected an integer of at least 1 and at most {MAX_RANK:,} (the paper uses 4 and 8)"
    if not is_alpha(alpha):
        yield f"alpha={alpha}: expected more than 0 and less than {MAX_ALPHA:g}"
    if not targets:
        yield "target_modules is empty: name at least one projection"
    if unknown := [name for name in targets if name not in PROJECTION_NAMES]:
        yield f"target_modules has {unknown}: expected some of {', '.join(PROJECTION_NAMES)}"
    expected = {
        "rank_pattern": f"an integer of 1 to {MAX_RANK:,}",
        "alpha_pattern": f"a number above 0, below {MAX_ALPHA:g}",
    }
    for key, is_right in _PATTERNS.items():
        for name, value in getattr(settings, key).items():
            if name not in targets:
                yield f"{key} has {name}: expected some of lora.target_modules ({', '.join(targets)})"
            elif not is_right(value):
                yield f"{key}[{name}]={value}: expected {expected[key]}"


def list_start_faults(settings: LoraSettings, shape: LlamaShape) -> Iterator[str]:
    """Yield which projections are too small for A and B made of their own columns and rows."""
    for target in settings.target_modules:
        rank, size = settings.rank_of(target), find_projection(target).size(shape)
        if rank > min(size):
            yield f"rank {rank} of {target}: expected at most {min(size)}, since its weight is {size[0]} x {size[1]}"


def is_rank(value: object) -> TypeGuard[int]:
    """Return whether a value is an integer of 1 to MAX_RANK."""
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_RANK


def is_alpha(value: object) -> TypeGuard[float]:
    """Return whether a value is a number above 0 and below MAX_ALPHA."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < MAX_ALPHA


_PATTERNS: Mapping[str, Callable[[object], bool]] = {"rank_pattern": is_rank, "alpha_pattern": is_alpha}
"""PEFT's settings of single projections. PEFT takes regular expressions as keys; names of projections mean the same there."""


def _is_pattern(value: object, is_right: Callable[[object], bool]) -> bool:
    return isinstance(value, Mapping) and all(name in PROJECTION_NAMES and is_right(one) for name, one in value.items())


def count_sizes(size: tuple[int, int], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B of a projection (out, in)."""
    num_out, num_in = size
    return (rank, num_in), (num_out, rank)


def update_names(projection: Projection, layer: int) -> UpdateNames:
    """Return the names of a projection's A and B in PEFT's adapter file."""
    prefix = f"base_model.model.{projection.path(layer)}"
    return UpdateNames(f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight")


def magnitude_name(projection: Projection, layer: int) -> str:
    """Return the name of the row lengths m (N,) of a projection in PEFT's adapter file, with DoRA."""
    return f"base_model.model.{projection.path(layer)}.{_MAGNITUDE}"


def is_magnitude(name: str) -> bool:
    """Return whether a tensor of PEFT's adapter file holds row lengths."""
    return name.endswith(f".{_MAGNITUDE}")


def gain_of(magnitude: Tensor, weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Return m / ||W0 + scale B A|| of each row, in float32. Shapes: (N,), (N, K), (r, K), (N, r) -> (N,)."""
    total = weight.float().addmm(up.float(), down.float(), alpha=scale)
    gain: Tensor = magnitude.float() / total.norm(dim=1)
    return gain


def rank_axis(name: str) -> int | None:
    """Return the axis of the rank in a tensor of PEFT's adapter file; None where it is neither A nor B."""
    return {"lora_A.weight": 0, "lora_B.weight": 1}.get(".".join(name.split(".")[-2:]))


def up_beside(name: str) -> str:
    """Return the name of the B beside an A in PEFT's adapter file."""
    return name.replace(".lora_A.", ".lora_B.")


def is_up(name: str) -> bool:
    """Return whether a parameter of PEFT's model, or a tensor of its adapter file, is a B."""
    return "lora_B" in name


def adapted_name(name: str) -> str:
    """Return the projection that a tensor of PEFT's adapter file belongs to; any text where it is neither A, B nor m."""
    if is_magnitude(name):
        return name.split(".")[-2]
    return name.rsplit(".", 3)[-3] if name.count(".") > 2 else ""


def list_adapter_tensors(shape: LlamaShape, settings: LoraSettings) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each tensor of an adapter file: A, B, A, B, ...; with DoRA A, B, m, ..."""
    for layer in range(shape.num_layers):
        for target in settings.target_modules:
            projection, rank = find_projection(target), settings.rank_of(target)
            yield from zip(update_names(projection, layer), count_sizes(projection.size(shape), rank), strict=True)
            if settings.dora:
                yield magnitude_name(projection, layer), projection.size(shape)[:1]


def list_sites(shape: LlamaShape, target_modules: Sequence[str]) -> Iterator[UpdateSite]:
    """Yield the sites of an adapter's updates, layer by layer in the order of PROJECTIONS."""
    for layer in range(shape.num_layers):
        for product in PRODUCTS:
            for projection, columns in product_columns(product, shape):
                if projection.name in target_modules:
                    yield UpdateSite(layer, projection, columns, update_names(projection, layer))


def list_modules(model: Any) -> Iterator[tuple[UpdateNames, Any]]:
    """Yield PEFT's layers of projections, each with the names of its A and B in the adapter file."""
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            yield UpdateNames(f"{name}.lora_A.weight", f"{name}.lora_B.weight"), module


def read_module(module: Any, columns: slice, scale: float) -> Update:
    """Return the update that PEFT's layer of a projection holds; it shares the parameters."""
    return Update(columns, module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight, scale)


def read_dropout(module: Any) -> float:
    """Return the dropout of PEFT's layer of a projection."""
    return float(getattr(module.lora_dropout[_ADAPTER], "p", 0.0))


def _is_among(value: object, plain: tuple[object, ...]) -> bool:
    return any(value is one or (isinstance(value, str) and value == one) for one in plain)
