"""Fixtures of the layers: a model with an adapter whose B is not zero."""

from __future__ import annotations

import pytest
import torch

from finlora.config import LoraConfig, ModelConfig
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.lora import attach_lora, trainable_parameters

CPU = torch.device("cpu")


@pytest.fixture
def make_model(tiny_base):
    """Build a frozen float32 base at some bits with an adapter whose B is not zero."""

    def build(bits, dropout=0.0, targets=("q_proj", "k_proj", "v_proj"), **changes):
        with quiet_bitsandbytes():
            base = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), bits, CPU, 0)
        lora = LoraConfig(rank=4, dropout=dropout, target_modules=targets)
        model = attach_lora(base.model, lora, str(tiny_base), 1)
        torch.manual_seed(5)
        for parameter in trainable_parameters(model).values():
            parameter.data = torch.randn_like(parameter) * 0.1
        model.train()
        for module in model.modules():
            if type(module).__name__ == "Linear8bitLt":
                module.eval()  # on CPU bitsandbytes trains with unquantised activations; in eval mode it is LLM.int8()
        return model

    return build
