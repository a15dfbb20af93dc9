"""Resolution of `auto` on a GPU, on processors with and without bfloat16 units, and in a resumed run."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from finlora.config import ModelConfig, RunConfig
from finlora.configfile import load_config, save_config
from finlora.evaluate.evaluation import check_evaluation
from finlora.inference.open_base import open_executor
from finlora.machine.cpu import Choice
from finlora.model.base import load_base
from finlora.model.base_files import read_base_files
from finlora.model.memory.padded_memory import element_bytes
from finlora.precision import describe_choice, resolve_evaluation, resolve_model, resolve_precision, resolve_training
from finlora.reproduce.paper_rows import Step

SHORT = {"bfloat16": "bf16", "float32": "fp32"}


@pytest.fixture(params=["bfloat16", "float32"])
def chosen(request, monkeypatch):
    """Type that a simulated processor multiplies faster."""
    monkeypatch.setattr("finlora.precision.choose_dtype", lambda: Choice(request.param, "it is pretended"))
    return request.param


def types_of(config):
    return config.model.compute_dtype, config.train.precision


def test_processor_decides_on_a_cpu(chosen):
    config = load_config(None, ["train.device=cpu", "eval.device=cpu"])
    resolved = resolve_training(config)
    assert types_of(resolved) == (chosen, SHORT[chosen])
    assert resolve_training(resolved) == resolved
    assert resolve_evaluation(config).model.compute_dtype == chosen
    assert resolve_precision("auto", "cpu") == SHORT[chosen]
    assert describe_choice(config, resolved) == f"Computes in {chosen}: it is pretended."
    assert element_bytes(config) == element_bytes(resolved) == {"bfloat16": 2, "float32": 4}[chosen]


def test_gpu_computes_in_bfloat16_whatever_the_processor(chosen):
    config = RunConfig()
    resolved = resolve_training(config)
    assert types_of(resolved) == ("bfloat16", "bf16")
    assert resolve_evaluation(config).model.compute_dtype == "bfloat16"
    assert resolve_precision("auto", "cuda") == "bf16"
    assert describe_choice(config, resolved) is None


def test_explicit_setting_is_obeyed(chosen):
    own = ["train.device=cpu", "eval.device=cpu"]
    config = load_config(None, ["model.compute_dtype=bfloat16", "train.precision=bf16", *own])
    assert resolve_training(config) == resolve_evaluation(config) == config
    assert describe_choice(config, config) is None
    config = load_config(None, ["model.compute_dtype=float32", *own])
    assert types_of(resolve_training(config)) == ("float32", SHORT[chosen])


def test_resumed_run_keeps_the_types_that_it_started_in(chosen, tmp_path):
    other = "float32" if chosen == "bfloat16" else "bfloat16"
    config = load_config(None, ["train.device=cpu"])
    begun = load_config(None, ["train.device=cpu", f"model.compute_dtype={other}", f"train.precision={SHORT[other]}"])
    save_config(begun, tmp_path / "config.yaml")
    resolved = resolve_training(config, tmp_path / "config.yaml")
    assert resolved == begun
    assert describe_choice(config, resolved) == (
        f"Computes in {other}, autocast {SHORT[other]}, as when the run started; on this machine: {chosen}, it is pretended."
    )
    for text in ("- no config", "model: [", "model: {compute_dtype: auto}\ntrain: 3\n"):
        (tmp_path / "config.yaml").write_text(text)
        assert types_of(resolve_training(config, tmp_path / "config.yaml")) == (chosen, SHORT[chosen])
    assert types_of(resolve_training(config, tmp_path / "missing.yaml")) == (chosen, SHORT[chosen])


def test_base_is_loaded_and_computes_in_the_chosen_type(chosen, make_config):
    config = make_config()
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, compute_dtype="auto"))
    base = load_base(config.model, 16, torch.device("cpu"), 0)
    assert base.dtype == base.model.lm_head.weight.dtype == getattr(torch, chosen)
    with open_executor(config, read_base_files(config.model), 1, 64, 64) as (executor, _):
        assert executor.stages[0].dtype == getattr(torch, chosen)
    assert f" bit (cpu, {chosen}: it is pretended): test" in check_evaluation(
        config, read_base_files(config.model), None
    )


def test_outcomes_of_a_reproduction_on_gpus_still_count():
    """Their keys come from configs in which bfloat16 was the default."""
    explicit = load_config(None, ["model.compute_dtype=bfloat16", "train.precision=bf16"])
    keys = {
        Step(name="x", kind="train", config=config, of_adapter=True, base_id="base").key
        for config in (explicit, resolve_training(RunConfig()))
    }
    assert len(keys) == 1


def test_settings_of_a_model_alone_are_resolved_by_its_device(chosen):
    assert resolve_model(ModelConfig(), "cuda").compute_dtype == "bfloat16"
    assert resolve_model(ModelConfig(), "cpu").compute_dtype == chosen
    assert resolve_model(ModelConfig(compute_dtype="float32"), "cuda").compute_dtype == "float32"
