"""A base of four layers, plain transformers beside it, and adapters that change what it says."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finlora.config import LLAMA_PROJECTIONS, LoraConfig, ModelConfig
from finlora.engine.drive import EngineCore
from finlora.engine.in_process import InProcess
from finlora.engine.limits import Limits
from finlora.engine.scheduler import Scheduler
from finlora.engine.stage import Stage
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.lora import attach_lora, load_adapter, save_adapter, trainable_parameters

CPU = torch.device("cpu")
END = 1


@pytest.fixture(scope="session")
def four_layers(tiny_base, tmp_path_factory):
    """Settings of a base of four layers with random weights in float32."""
    folder = tmp_path_factory.mktemp("four") / "base"
    shutil.copytree(tiny_base, folder)
    values = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 4, "initializer_range": 0.2}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").unlink()
    return ModelConfig(base=str(folder), weights="random", compute_dtype="float32")


@pytest.fixture(scope="session")
def adapter_folders(four_layers, tmp_path_factory):
    """Two adapters: on q, k and v, and on every projection; their 16-bit files are what both sides read."""
    folders = {}
    for name, targets in (("few", ("q_proj", "k_proj", "v_proj")), ("all", LLAMA_PROJECTIONS)):
        model = attach_lora(
            load_base(four_layers, 16, CPU, 0).model, LoraConfig(rank=4, target_modules=targets), four_layers.base, 1
        )
        torch.manual_seed(len(targets))
        for parameter in trainable_parameters(model).values():
            parameter.data = torch.randn_like(parameter) * 0.2
        folders[name] = tmp_path_factory.mktemp("adapters") / name
        save_adapter(model, folders[name])
    return folders


@pytest.fixture(scope="session")
def late_fault(adapter_folders, tmp_path_factory):
    """An adapter that only the stage with the last layer finds wrong."""
    folder = shutil.copytree(adapter_folders["all"], tmp_path_factory.mktemp("late") / "fault")
    tensors = load_file(folder / "adapter_model.safetensors")
    name = "base_model.model.model.layers.3.self_attn.v_proj.lora_B.weight"
    save_file(tensors | {name: tensors[name][:-8].clone()}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def plain(four_layers, adapter_folders):
    """transformers' and PEFT's own model at some bits, with an adapter or without."""
    models = {}

    def load(bits=16, adapter=None):
        key = (bits, adapter)
        if key not in models:
            with quiet_bitsandbytes():
                base = load_base(four_layers, bits, CPU, 0).model
                models[key] = load_adapter(base, adapter_folders[adapter]) if adapter else base
        return models[key]

    return load


@pytest.fixture
def make_core(four_layers, adapter_folders):
    """Build an engine of some stages in this process, with both adapters loaded."""

    def build(num_stages=1, bits=16, keep_unpacked=False, fills=False, **limits):
        settings = Limits(**{"cache_rows": 1024, "max_in_flight": num_stages, "follows": True} | limits)
        size = 4 // num_stages
        stages = []
        with quiet_bitsandbytes():
            for number in range(num_stages):
                span = range(number * size, (number + 1) * size)
                base = load_base(four_layers, bits, CPU, 0, span)
                stage = Stage(base.model, span, settings.cache_rows, torch.float32, keep_unpacked=keep_unpacked)
                stage.passes.fills = fills
                stages.append(stage)
        core = EngineCore(InProcess(stages), Scheduler(settings, END, lambda: 3), base.tokenizer)
        for name, folder in adapter_folders.items():
            core.load_adapter(name, folder)
        return core

    return build
