"""LoRA adapters through PEFT: attach, save, load. An adapter folder holds PEFT's two files and our config."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finlora.config import LoraConfig
from finlora.durable import follow_umask, scratch_folder
from finlora.errors import AdapterError
from finlora.formula.llama import shape_of
from finlora.formula.low_rank import peft_settings
from finlora.machine.lean_imports import lean_imports
from finlora.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, find_sites, open_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM


def attach_lora(net: LlamaForCausalLM, lora: LoraConfig, base: str, seed: int) -> PeftModel:
    """Put new adapters on the base: W x + scale B A x with B = 0, so that the first output equals the base's.

    The trainable A (rank, in) and B (out, rank) are float32; the base is untouched.

    Source: LoRA, arXiv:2106.09685, section 4.1.
    """
    with lean_imports():
        import peft

    torch.manual_seed(seed)  # A is sampled here: every worker must start from the same
    settings = peft.LoraConfig(
        **peft_settings(lora.settings, lora.dropout),
        base_model_name_or_path=base,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        return peft.get_peft_model(net, settings, autocast_adapter_dtype=True)


def save_adapter(model: PeftModel, folder: Path) -> float:
    """Write PEFT's adapter_model.safetensors (bf16) and adapter_config.json; the config is written last.

    The weights are written to a temporary folder beside the target, so a crash leaves the old adapter or none.

    Returns:
        Size of the weights file in MiB.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(folder.parent, f".{folder.name}-") as staging:
        state = get_peft_model_state_dict(model)
        tensors = {name: tensor.detach().to("cpu", torch.bfloat16).contiguous() for name, tensor in state.items()}
        save_file(tensors, str(staging / ADAPTER_WEIGHTS), metadata={"format": "pt"})
        settings = model.peft_config["default"]
        settings.inference_mode = True
        settings.save_pretrained(str(staging))
        settings.inference_mode = False
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
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    return model.eval()


def trainable_parameters(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters by name, in model order."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
