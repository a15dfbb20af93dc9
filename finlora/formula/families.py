"""Families of bases that are Llama's layer with a few additions: what each adds, read once from its config.json.

A family is one record here. The shape of a base (llama.py) carries what the family adds, so training, stages, merge, the memory
planner and the checks follow it. What a family's config can ask for beyond that is refused (finlora/model/architecture.py).

Source: transformers' modeling files of each family; tests compare each path with them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True, slots=True)
class Additions:
    """What a base adds to the plain layer of Llama; all that does nothing by default."""

    biases: tuple[str, ...] = ()
    """Projections y = x W^T + b; b is frozen."""
    has_head_norms: bool = False
    """RMSNorm of each query and key head, between projection and rotation, with one weight (d,) for queries and one for keys."""
    unrotated: tuple[int, ...] = ()
    """Layers without rotary embedding."""
    window: int | None = None
    """Keys that a query sees, its own included. Sequences of at most so many tokens attend to all of their keys."""
    embedding_scale: float = 1.0
    """Factor of the embedding's output."""
    score_scale: float | None = None
    """Factor of the attention scores; None: 1 / sqrt(d)."""
    residual_scale: float = 1.0
    """Factor of the outputs of attention and MLP before they are added to the residual stream."""
    logits_scale: float = 1.0
    """Factor of the logits."""


PLAIN = Additions()
"""A Llama without biases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A `model_type` of config.json."""

    title: str
    config_class: str
    """Of the package transformers, as is `model_class`."""
    model_class: str
    keys: frozenset[str] = frozenset()
    """Keys of config.json that `read` honours; another family's config must not turn them on."""
    read: Callable[[Mapping[str, Any]], Additions]
    """Read transformers' config.to_dict(). Raises ValueError for a factor that is no positive number."""


def _read_llama(values: Mapping[str, Any]) -> Additions:
    return Additions(biases=_read_biases(values))


def _read_mistral(values: Mapping[str, Any]) -> Additions:
    return Additions(window=values.get("sliding_window"))


def _read_qwen2(values: Mapping[str, Any]) -> Additions:
    return Additions(biases=_ATTENTION[:3], window=_read_window(values))


def _read_qwen3(values: Mapping[str, Any]) -> Additions:
    return Additions(biases=_read_biases(values), has_head_norms=True, window=_read_window(values))


def _read_smollm3(values: Mapping[str, Any]) -> Additions:
    rotated = values["no_rope_layers"]  # 1 where a layer is rotated
    return Additions(
        biases=_read_biases(values),
        unrotated=tuple(layer for layer in range(int(values["num_hidden_layers"])) if not rotated[layer]),
        window=_read_window(values),
    )


def _read_granite(values: Mapping[str, Any]) -> Additions:
    return Additions(
        biases=_read_biases(values),
        embedding_scale=_read_factor(values, "embedding_multiplier"),
        score_scale=_read_factor(values, "attention_multiplier"),
        residual_scale=_read_factor(values, "residual_multiplier"),
        logits_scale=1 / _read_factor(values, "logits_scaling"),
    )


def _read_biases(values: Mapping[str, Any]) -> tuple[str, ...]:
    attention = _ATTENTION if values.get("attention_bias") else ()
    return attention + (_MLP if values.get("mlp_bias") else ())


def _read_window(values: Mapping[str, Any]) -> int | None:
    """Return the window of bases of which only some layers have one."""
    if "sliding_attention" not in (values.get("layer_types") or []) or not values.get("use_sliding_window", True):
        return None
    return values.get("sliding_window")


def _read_factor(values: Mapping[str, Any], key: str) -> float:
    value = float(values[key])
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{key}={value:g}, expected a positive number")
    return value


_WINDOW = {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
FAMILIES: Mapping[str, Family] = {
    "llama": Family(
        title="Llama",
        config_class="LlamaConfig",
        model_class="LlamaForCausalLM",
        keys=frozenset({"attention_bias", "mlp_bias"}),
        read=_read_llama,
    ),
    "mistral": Family(
        title="Mistral",
        config_class="MistralConfig",
        model_class="MistralForCausalLM",
        keys=frozenset({"sliding_window"}),
        read=_read_mistral,
    ),
    "qwen2": Family(
        title="Qwen2",
        config_class="Qwen2Config",
        model_class="Qwen2ForCausalLM",
        keys=frozenset(_WINDOW),
        read=_read_qwen2,
    ),
    "qwen3": Family(
        title="Qwen3",
        config_class="Qwen3Config",
        model_class="Qwen3ForCausalLM",
        keys=frozenset({"attention_bias", *_WINDOW}),
        read=_read_qwen3,
    ),
    "smollm3": Family(
        title="SmolLM3",
        config_class="SmolLM3Config",
        model_class="SmolLM3ForCausalLM",
        keys=frozenset({"attention_bias", "mlp_bias", "no_rope_layers", "no_rope_layer_interval", *_WINDOW}),
        read=_read_smollm3,
    ),
    "granite": Family(
        title="Granite",
        config_class="GraniteConfig",
        model_class="GraniteForCausalLM",
        keys=frozenset(
            {
                *("attention_bias", "mlp_bias", "embedding_multiplier", "attention_multiplier"),
                *("residual_multiplier", "logits_scaling"),
            }
        ),
        read=_read_granite,
    ),
}
"""By `model_type`."""


def find_family(values: Mapping[str, Any]) -> Family:
    """Return the family of a config; one without `model_type` is a Llama's."""
    return FAMILIES[values.get("model_type", "llama")]
