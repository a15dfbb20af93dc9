"""Checks that a base is of a family that every path computes; any other config key or tensor is refused by name.

Packed and padded training, the engine's stages, the planner, merge and the cache of quantised bases all get a base from
`find_source`, which runs these checks: so no path can ignore what another one computes. The reference is transformers' model
class of the family; tests compare each path with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finlora.configfile import show
from finlora.errors import ModelError
from finlora.formula.families import FAMILIES, Family, find_family
from finlora.formula.llama import ACTIVATIONS, HEAD, LlamaShape, list_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ONE_VALUE: dict[str, tuple[object, ...]] = {
    "hidden_act": ACTIVATIONS,
    "attention_dropout": (0, None),
}
"""Keys that transformers reads, with the one value that every path here computes."""
_LABEL_ROOM = 64
"""An evaluated example is measured with its right label, and its other labels follow the prompt too."""
_ATTENTION_KINDS = ("full_attention", "sliding_attention")

# Read by every path, or by none because they change no number: sizes, token ids, notes of the tools that wrote the file.
# pretraining_tp splits products without changing them, and transformers no longer reads it.
_KNOWN = {
    *("model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    *("initializer_range", "tie_word_embeddings", "pretraining_tp", "use_cache"),
    *("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings", "partial_rotary_factor"),
    *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "auto_map", "quantization_config"),
    *("_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "_flash_attn_2_enabled"),
}
_MATHS = re.compile(
    r"bias|(^|_)rope|rotary|scal(e|ing)|multiplier|softcap|window|expert|(^|_)moe|alibi|(^|_)mup|interleav|qk_norm|norm_type"
    r"|parallel_(attn|block|residual)|clip_qkv",
    re.IGNORECASE,
)
"""Parts of key names that change the formula in relatives of Llama. transformers reads none of them but a family's own keys, so a
model that needs one would give wrong answers silently."""

_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose angles depend on the position alone. `dynamic` and `longrope` depend on the longest sequence of a
pass too: among the requests or packed examples of a pass, one would change the others."""
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor"),
    *("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    *("partial_rotary_factor", "finetuned"),
}

_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(original_)?inv_freq")
"""Tensors that old versions of transformers wrote; every path computes them from config.json."""
_KINDS = (
    (re.compile(r"\.bias$"), "biases, which its config.json does not turn on"),
    (re.compile(r"\.(q|k)_norm\.weight$"), "norms of heads, which its model_type does not have"),
    (
        re.compile(r"lora_|base_layer|modules_to_save"),
        "an adapter inside the model: merge it with PEFT (merge_and_unload)",
    ),
    (re.compile(r"scale|SCB|absmax|quant|qweight|qzeros|g_idx|packed"), "quantised weights: give the 16-bit model"),
    (re.compile(r"^(score|classifier|v_head)\."), "a head of another task: give the causal language model"),
)
_DTYPES = ("F64", "F32", "F16", "BF16")


class StoredTensor(NamedTuple):
    """Location of a tensor, from the header of its safetensors file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int


def check_family(folder: Path, values: Mapping[str, Any]) -> Family:
    """Return the family of a config.json, by its `model_type`.

    Raises:
        ModelError: FinLoRA does not run that family.
    """
    kind = values.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    remedy = "Choose another base."
    if kind == "phi3":
        remedy = (
            "Phi-3 and Phi-4 hold q, k and v in one matrix, and gate and up in another, so that LoRA has other targets: give a "
            "copy in Llama's layout (model_type llama), or choose another base."
        )
    raise ModelError(
        f"{folder} is a {show(kind)} model: FinLoRA runs model_type {', '.join(FAMILIES)}, since its adapters, pipeline stages "
        f"and memory plan are checked on those architectures. {remedy}"
    )


def check_config(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuse a config.json with which some path would compute something else than transformers.

    Raises:
        ModelError: names every such key with its value.
    """
    family = find_family(values)
    odd = {key: values[key] for key, plain in _ONE_VALUE.items() if key in values and values[key] not in plain}
    window, context = values.get("sliding_window"), values.get("max_position_embeddings")
    is_whole = isinstance(window, int) and isinstance(context, int) and window >= context
    is_read = "sliding_window" in family.keys and isinstance(window, int) and window > 0
    if window is not None and not is_whole and not is_read and values.get("use_sliding_window") is not False:
        odd["sliding_window"] = window
    layer_types = values.get("layer_types") or []
    kinds = _ATTENTION_KINDS if "layer_types" in family.keys else _ATTENTION_KINDS[:1]
    if not isinstance(layer_types, list) or any(kind not in kinds for kind in layer_types):
        odd["layer_types"] = layer_types
    if values.get("partial_rotary_factor") not in (None, 1):
        odd["partial_rotary_factor"] = values["partial_rotary_factor"]
    code = values.get("auto_map")
    if isinstance(code, dict) and {"AutoModel", "AutoModelForCausalLM"} & code.keys():
        odd["auto_map"] = code
    strange = {key: value for key, value in values.items() if _is_strange(key, value, family)}
    if not odd and not strange:
        return
    named = ", ".join(f"{show(key)[1:-1]}={show(value)}" for key, value in list((odd | strange).items())[:8])
    if set(odd) | set(strange) == {"attention_dropout"}:
        advice = "set it to 0 in a copy of the model: its answers stay the same, and training has lora.dropout"
    elif odd:
        advice = f"choose a {family.title} without them"
    else:
        advice = "choose another base, or if it does not need them, remove them from a copy of its config.json"
    raise ModelError(
        f"{folder}/config.json needs what FinLoRA's {family.title} does not compute: {named}. Training and answers "
        f"would differ from the original model's, so every command refuses it: {advice}."
    )


def check_window(folder: Path, shape: LlamaShape, max_seq_len: int) -> None:
    """Refuse sequences that are longer than the base's attention window; within it every path computes the same as without one.

    Raises:
        ModelError: names the setting that limits sequences.
    """
    window = shape.additions.window
    if window is None or max_seq_len <= window - _LABEL_ROOM:
        return
    advice = f"set model.max_seq_len={window - _LABEL_ROOM}" if window > 2 * _LABEL_ROOM else "choose another base"
    raise ModelError(
        f"{folder} has sliding-window attention (sliding_window={window}): FinLoRA computes full attention, which is the same "
        f"within the window. Expected model.max_seq_len of at most {window - _LABEL_ROOM:,}, since {_LABEL_ROOM} tokens are kept "
        f"for labels longer than the right one; found {max_seq_len:,}: {advice}."
    )


def check_rotary(folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a rotary embedding that depends on more than the position, or lacks parameters.

    Args:
        config: as transformers read it; `rope_parameters` holds what config.json says in any version's spelling.

    Raises:
        ModelError: names the parameters.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope: dict[str, Any] = dict(config.rope_parameters or {})
    kind = rope.get("rope_type", "default")
    strange = [
        f", {show(key)[1:-1]}={show(rope[key])}" for key in rope if key not in _ROPE_KEYS and rope[key] is not None
    ]
    if rope.get("partial_rotary_factor") not in (None, 1):
        strange.append(f", partial_rotary_factor={show(rope['partial_rotary_factor'])}")
    if kind not in _ROPES or strange:
        raise ModelError(
            f"{folder}/config.json needs a rotary embedding that FinLoRA does not compute: "
            f"rope_type={show(kind)}{''.join(strange)}. Expected a rope_type of {', '.join(_ROPES)} over the whole head, whose "
            "angles depend on the position alone: choose another base."
        )
    try:
        if kind != "default":
            angles, _ = ROPE_INIT_FUNCTIONS[kind](config, None)
            if not bool(angles.isfinite().all()):
                raise ValueError("its frequencies are not finite")
    except Exception as error:  # each odd parameter raises another exception
        raise ModelError(
            f"{folder}/config.json has invalid rope parameters ({show(rope)}: {error}): copy the model again."
        ) from error


def check_tensors(folder: Path, shape: LlamaShape, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse files that lack a tensor, or hold one of another shape or type or one that no path reads.

    Raises:
        ModelError: names the tensors.
    """
    if shape.num_layers > len(tensors):  # before naming each layer's tensors: the number may be huge
        raise ModelError(
            f"{folder} holds {len(tensors)} tensors and its config.json says num_hidden_layers={shape.num_layers}: it describes "
            "another model, copy both again."
        )
    expected = {tensor.name: tensor.shape for tensor in list_tensors(shape)}
    missing = [name for name in expected if name not in tensors]
    extra = [name for name in tensors if name not in expected and not _is_spare(name, shape)]
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        instead = f" They hold {show(extra[0])[1:-1]}, which it does not name." if extra else ""
        raise ModelError(
            f"{folder} has no tensor {missing[0]}{others}: its config.json describes another model, copy both again.{instead}"
        )
    for name, wanted in expected.items():
        found = tensors[name]
        if found.shape != wanted:
            raise ModelError(
                f"{found.path} holds {name} as {list(found.shape)} where config.json says {list(wanted)}: copy both again."
            )
        if found.dtype not in _DTYPES:
            raise ModelError(
                f"{found.path} holds {name} as {found.dtype}: expected {', '.join(_DTYPES)}. Give the 16-bit model, FinLoRA "
                "quantises while loading."
            )
    if extra:
        kind = next((words for pattern, words in _KINDS if any(pattern.search(name) for name in extra)), "")
        raise ModelError(
            f"{tensors[extra[0]].path} holds {len(extra)} tensors that FinLoRA does not compute with"
            f" ({', '.join(show(name)[1:-1] for name in extra[:3])}{', ...' if len(extra) > 3 else ''})"
            f"{f': {kind}' if kind else ''}. Its answers would differ from the model's, so every command refuses it: choose "
            "another base."
        )


def _is_spare(name: str, shape: LlamaShape) -> bool:
    """Return whether an extra tensor changes nothing: a copy of the embedding as head, or a rotary buffer."""
    return (name == HEAD and shape.is_tied) or bool(_BUFFERS.fullmatch(name))


def _is_strange(key: str, value: object, family: Family) -> bool:
    """Return whether a key that transformers does not read for this family turns another formula on."""
    known = key in _KNOWN or key in _ONE_VALUE or key in family.keys
    return not known and bool(_MATHS.search(key)) and not _is_neutral(value)


def _is_neutral(value: object) -> bool:
    """Return whether a setting does nothing: absent, off, or a factor of one."""
    return value is None or value is False or value in ("", [], {}) or (value in (0, 1) and value is not True)
