"""LoRA adapters through PEFT: attach, save, load. An adapter folder holds PEFT's two files and our config.

PiSSA and OLoRA begin with A0 and B0 made of the base's weights, of which the base then has only the rest: W0 - scale B0 A0. What
training adds to the base is scale (B A - B0 A0), which is plain LoRA of twice the rank on W0: that is what is saved.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finlora.durable import follow_umask, scratch_folder
from finlora.errors import AdapterError, ConfigError
from finlora.formula.llama import shape_of
from finlora.formula.lora_config import LoraConfig
from finlora.formula.low_rank import (
    is_magnitude,
    list_modules,
    list_start_faults,
    peft_settings,
    rank_axis,
    read_module,
    read_settings,
    up_beside,
)
from finlora.machine.lean_imports import lean_imports
from finlora.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, find_sites, open_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

Start = Mapping[str, torch.Tensor]
"""A0 and B0 in float32 by their names in PEFT's adapter file, in a base that lacks scale B0 A0."""


def attach_lora(net: LlamaForCausalLM, lora: LoraConfig, base: str, seed: int, start: Start | None = None) -> PeftModel:
    """Put new adapters on the base: W x + scale B A x with B = 0, so that the first output equals the base's.

    The trainable A (rank, in) and B (out, rank) are float32. The base is untouched, except by a `lora.init` that begins with a
    part of it: then `read_start` of the new model returns that part.

    Args:
        start: take this part out of the base, as found before. None: PEFT finds it.

    Raises:
        ConfigError: `lora.init` cannot begin with a part of this base.

    Source: LoRA, arXiv:2106.09685, section 4.1.
    """
    if lora.changes_base:
        faults = list(list_start_faults(lora.settings, shape_of(net.config.to_dict())))
        if net.is_loaded_in_8bit or net.is_loaded_in_4bit:
            faults.append("a quantised base: expected model.bits=16")
        if faults:
            raise ConfigError([f"lora.init={lora.init}: {fault}" for fault in faults])
    with lean_imports():
        import peft

    torch.manual_seed(seed)  # A is sampled here: every worker must start from the same
    with warnings.catch_warnings():
        # PEFT's way back to plain LoRA keeps no scale of rsLoRA with patterns; `_less_start` and `widen` do.
        warnings.filterwarnings("ignore", message="Using Rank-Stabilized LoRA with rank_pattern", category=UserWarning)
        settings = peft.LoraConfig(
            **peft_settings(lora.settings, lora.dropout),
            base_model_name_or_path=base,
            init_lora_weights=lora.init if lora.changes_base and start is None else True,
        )
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        model = peft.get_peft_model(net, settings, autocast_adapter_dtype=True)
    if lora.changes_base and start is not None:
        _take_out(model, start)
    model.peft_config["default"].init_lora_weights = True  # from here on it is LoRA on the base as it is now
    return model


def read_start(model: PeftModel) -> Start:
    """Return copies of the A0 and B0 that an adapter begins with, before a step changes them."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().float().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


@torch.no_grad()
def _take_out(model: PeftModel, start: Start) -> None:
    """Set A and B to a start, and subtract scale B0 A0 from the base in float32, as PEFT's pissa_init does."""
    for names, module in list_modules(model):
        scale = module.scaling["default"]
        update = read_module(module, slice(None), scale)
        for name, parameter in zip(names, (update.down, update.up), strict=True):
            parameter.copy_(start[name])
        weight = module.get_base_layer().weight
        weight.data = (weight.float() - scale * update.up @ update.down).to(weight.dtype)


def _less_start(state: Mapping[str, torch.Tensor], start: Start) -> dict[str, torch.Tensor]:
    """Return A and B of twice the rank whose product is B A - B0 A0.

    PEFT stacks [A; A0] and [B, -B0], whose products nearly cancel: rounded to bfloat16, little of the difference would be left.
    These are the difference's own factors, from its singular values.
    """
    found = {}
    for name in state:
        if rank_axis(name) != 0:
            continue
        other = up_beside(name)
        downs, ups = (
            torch.cat([tensors[each].detach().cpu().double() for tensors in (state, start)], axis)
            for each, axis in ((name, 0), (other, 1))
        )
        ups[:, ups.shape[1] // 2 :].neg_()
        (left, upper), (right, lower) = torch.linalg.qr(ups), torch.linalg.qr(downs.t())
        inner_left, values, inner_right = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
        roots = values.sqrt()
        up, down = left @ inner_left * roots, (right @ inner_right.t() * roots).t()
        missing = len(downs) - len(roots)  # a projection may have fewer rows or columns than twice the rank
        found[name] = torch.nn.functional.pad(down, (0, 0, 0, missing))
        found[other] = torch.nn.functional.pad(up, (0, missing))
    return found


def save_adapter(model: PeftModel, folder: Path, start: Start | None = None) -> float:
    """Write PEFT's adapter_model.safetensors (bf16, row lengths float32) and adapter_config.json; the config is written last.

    The weights are written to a temporary folder beside the target, so a crash leaves the old adapter or none.

    Args:
        start: what the base lacks in training; the saved adapter is then of twice the rank, for the unchanged base.

    Returns:
        Size of the weights file in MiB.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, f".{folder.name}-") as staging:
        state = get_peft_model_state_dict(model)
        settings = copy.deepcopy(model.peft_config["default"])
        if start is not None:
            state = _less_start(state, start)
            own = read_settings(settings.to_dict())
            assert own is not None, "attach_lora wrote them"
            for key, value in peft_settings(own.widen(), settings.lora_dropout).items():
                setattr(settings, key, value)
        # Row lengths scale the base's own weights, so bfloat16 would round these.
        types = {name: torch.float32 if is_magnitude(name) else torch.bfloat16 for name in state}
        tensors = {name: tensor.detach().to("cpu", types[name]).contiguous() for name, tensor in state.items()}
        save_file(tensors, str(staging / ADAPTER_WEIGHTS), metadata={"format": "pt"})
        settings.inference_mode = True
        settings.save_pretrained(str(staging))
        size = (staging / ADAPTER_WEIGHTS).stat().st_size / 2**20
        follow_umask(staging)
        folder.mkdir(exist_ok=True)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            (staging / name).replace(folder / name)
    return size


def load_adapter(net: LlamaForCausalLM, folder: Path) -> PeftModel:
    """Put a saved adapter on its base, frozen and in eval mode.

    Raises:
        AdapterError: the folder is missing or incomplete, is not plain LoRA, holds numbers that are not finite, or its
            tensors do not fit this base.
    """
    with lean_imports():
        from peft import PeftModel

    settings = check_adapter(folder)
    with open_weights(folder, settings) as (_, shapes):
        find_sites(folder, settings, shapes, shape_of(net.config.to_dict()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            # PEFT only warns when the file lacks tensors, and initialises them: that would be another adapter.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            model = PeftModel.from_pretrained(net, str(folder), is_trainable=False)
    except Exception as error:  # PEFT and safetensors raise many types; each means that the folder cannot be loaded
        raise AdapterError(f"{folder} cannot be loaded on this base ({type(error).__name__}: {error}).") from error
    # Adapters in the type of the activations need no cast in each forward pass.
    dtype = net.get_input_embeddings().weight.dtype
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def trainable_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters by name, in model order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
