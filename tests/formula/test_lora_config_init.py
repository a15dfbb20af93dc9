"""PiSSA and OLoRA against PEFT: the start, its way back to plain LoRA on the unchanged base, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_families import CPU, EXAMPLES, assert_near, gradients_of, run_plain, run_stages

from finlora.config import ModelConfig, RunConfig
from finlora.data.encode import collate
from finlora.data.packing import pack_examples
from finlora.errors import CheckpointError, ConfigError
from finlora.formula.llama import shape_of
from finlora.formula.lora_config import LoraConfig
from finlora.formula.low_rank import peft_settings
from finlora.model.base import load_base
from finlora.model.contract import make_contract
from finlora.model.layers.packed_model import PackedLlama
from finlora.model.lora import attach_lora, load_adapter, read_start, save_adapter, trainable_parameters
from finlora.model.memory.fixed_memory import count_adapter_file_bytes
from finlora.model.merge import merge_lora
from finlora.train.run.adapter_start import attach_adapter
from finlora.train.run.run_folder import RunFolder
from finlora.train.steps.loop import AnswerLoss

STARTS = ("pissa", "pissa_niter_4", "olora")
PATTERNS = {"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"o_proj": 3.0}}
MORE = {"": {}, "rslora": {"rslora": True}, "patterns": PATTERNS, "both": {"rslora": True, **PATTERNS}}
TARGETS = ("q_proj", "k_proj", "o_proj", "down_proj")


def config_of(start, more="", **settings):
    return LoraConfig(
        rank=3, alpha=7.0, target_modules=TARGETS, init=start, **{"dropout": 0.0, **MORE[more], **settings}
    )


def load(tiny_base, bits=16):
    return load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), bits, CPU, 0)


def attach(tiny_base, lora, start=None):
    return attach_lora(load(tiny_base).model, lora, str(tiny_base), 1, start)


def train(model):
    """Change A and B as some steps would: a little."""
    torch.manual_seed(5)
    for parameter in trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 0.02


def weights_of(model):
    return [module.get_base_layer().weight for module in model.modules() if hasattr(module, "lora_A")]


def products_of(tensors):
    return [
        tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
        for name in sorted(tensors)
        if "A" in name
    ]


@pytest.mark.parametrize("start", STARTS)
def test_start_is_pefts_and_leaves_the_output_as_it_was(tiny_base, start):
    lora = config_of(start)
    model = attach(tiny_base, lora)
    assert_near(run_plain(model), run_plain(load(tiny_base).model))
    torch.manual_seed(1)
    settings = peft.LoraConfig(**peft_settings(lora.settings, 0.0), init_lora_weights=start)
    theirs = peft.get_peft_model(load(tiny_base).model, settings)
    for mine, other in zip(weights_of(model), weights_of(theirs), strict=True):
        assert torch.equal(mine, other)
    found = read_start(model)
    assert all(torch.equal(tensor, read_start(theirs)[name]) for name, tensor in found.items())
    assert all(tensor.abs().max() > 0 for tensor in found.values())
    again = attach(tiny_base, lora, found)  # as another worker, or after a resume
    assert all(torch.equal(mine, other) for mine, other in zip(weights_of(again), weights_of(model), strict=True))
    assert all(torch.equal(tensor, read_start(again)[name]) for name, tensor in found.items())


@pytest.mark.parametrize("more", ["", "rslora", "patterns"])  # PEFT 0.21 converts no adapter with both
@pytest.mark.parametrize("start", STARTS)
def test_saved_adapter_is_pefts_conversion_to_plain_lora(tiny_base, tmp_path, start, more):
    lora = config_of(start, more)
    model = attach(tiny_base, lora)
    first = read_start(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path / "initial"))
        train(model)
        size = save_adapter(model.eval(), tmp_path / "own", first)
        model.save_pretrained(
            str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
    own, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("own", "theirs"))
    assert {name: tensor.shape for name, tensor in own.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }
    for mine, other in zip(products_of(own), products_of(theirs), strict=True):
        assert float((mine - other).norm() / other.norm()) < 4e-3  # the file's bfloat16
    settings, other = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("own", "theirs"))
    for key in ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        assert settings[key] == other[key]
    shape = shape_of(model.get_base_model().config.to_dict())
    assert round(size * 2**20) == count_adapter_file_bytes(shape, lora)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_is_trained_is_what_is_served_and_merged(tiny_base, tmp_path, start):
    lora = config_of(start, "both")
    model = attach(tiny_base, lora)
    first = read_start(model)
    train(model)
    save_adapter(model.eval(), tmp_path, first)
    trained, base = run_plain(model), run_plain(load(tiny_base).model)
    settings = ModelConfig(base=str(tiny_base), compute_dtype="float32")
    plain = run_plain(load_adapter(load(tiny_base).model, tmp_path))
    merged = load(tiny_base)
    merge_lora(merged, tmp_path)
    for found in (
        run_stages(settings, 1, adapter=tmp_path),
        run_stages(settings, 2, adapter=tmp_path),
        run_plain(merged.model),
    ):
        assert_near(found, plain)
    for mine, theirs, before in zip(plain, trained, base, strict=True):
        assert float((mine - theirs).norm() / (theirs - before).norm()) < 0.01  # of what training changed: bfloat16


def test_balanced_factors_keep_what_stacked_ones_lose_in_bfloat16(tiny_base, tmp_path):
    model = attach(tiny_base, config_of("pissa"))
    first = read_start(model)
    torch.manual_seed(5)
    for parameter in trainable_parameters(model).values():
        parameter.data += torch.randn_like(parameter) * 1e-4
    save_adapter(model.eval(), tmp_path, first)
    now = read_start(model)
    for name in (name for name in now if "lora_A" in name):
        other = name.replace("lora_A", "lora_B")
        exact = now[other].double() @ now[name].double() - first[other].double() @ first[name].double()
        stacked = now[other].bfloat16().double() @ now[name].bfloat16().double()
        stacked -= first[other].bfloat16().double() @ first[name].bfloat16().double()
        own = load_file(tmp_path / "adapter_model.safetensors")
        mine = own[other].double() @ own[name].double()
        assert (mine - exact).norm() < 0.01 * exact.norm() < (stacked - exact).norm()


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_packed_gradients_equal_pefts(tiny_base, recompute):
    model = attach(tiny_base, config_of("pissa")).train()
    train(model)
    expected = gradients_of(model, AnswerLoss(model), collate(EXAMPLES, 2))
    module = PackedLlama(model, torch.float32, recompute=recompute)
    own = gradients_of(model, module, pack_examples(EXAMPLES, share_prefix=True))
    assert own[0] == pytest.approx(expected[0], rel=1e-5)
    assert_near(own[1], expected[1], 1e-5)


def test_resumed_run_takes_the_part_out_that_it_took_out_before(tiny_base, tmp_path):
    model = ModelConfig(base=str(tiny_base), bits=16)
    config = RunConfig(lora=config_of("pissa_niter_1"), model=model)
    folder = RunFolder(tmp_path)

    def start(worker=0, run_hash="a", seed=1):
        return attach_adapter(load(tiny_base).model, dataclasses.replace(config, seed=seed), folder, run_hash, worker)

    with pytest.raises(CheckpointError, match="is missing on this node"):
        start(worker=1)
    (net, first), (again, second), (_, third) = start(), start(seed=2), start(worker=1)
    assert all(torch.equal(first[name], second[name]) and torch.equal(first[name], third[name]) for name in first)
    assert all(torch.equal(mine, other) for mine, other in zip(weights_of(net), weights_of(again), strict=True))
    _, other = start(run_hash="b", seed=2)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    tensors = load_file(folder.adapter_start)
    name = next(iter(tensors))
    tensors[name][0, 0] += 1
    from safetensors import safe_open

    with safe_open(str(folder.adapter_start), "pt") as file:
        facts = file.metadata()
    save_file(tensors, folder.adapter_start, facts)
    with pytest.raises(CheckpointError, match="its numbers differ from its hash"):
        start(run_hash="b")
    folder.adapter_start.write_bytes(b"short")
    with pytest.raises(CheckpointError, match="is damaged"):
        start(run_hash="b")
    config = RunConfig(model=model)
    assert attach_adapter(load(tiny_base).model, config, RunFolder(tmp_path / "plain"), "a", 0)[1] is None


def test_contract_names_the_start_and_the_rank_of_the_file(tiny_base):
    contract = make_contract(load(tiny_base), "base", config_of("olora"), "raw", {}, 1, 0.1, {})
    assert (contract.rank, contract.alpha, contract.lora_variant) == (6, 14.0, "OLoRA start of rank 3")


@pytest.mark.parametrize(
    ("bits", "init", "words"),
    [
        (4, "pissa", r"lora\.init=pissa with model\.bits=4: .* rounded to 4 bit anew.* Set model\.bits=16"),
        (8, "olora", r"lora\.init=olora with model\.bits=8"),
        (16, "loftq", r"lora\.init=loftq: expected default, pissa, pissa_niter_N .* no other start of PEFT"),
        (16, "pissa_niter_0", r"lora\.init=pissa_niter_0: expected"),
    ],
)
def test_start_that_would_fit_no_served_base_is_refused(bits, init, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig(model=ModelConfig(bits=bits), lora=LoraConfig(init=init))


def test_rank_beyond_the_weights_or_the_file_is_refused(tiny_base):
    with pytest.raises(ConfigError, match=r"rank=3000 with init=pissa: expected at most 2,048"):
        LoraConfig(rank=3000, init="pissa")
    lora = LoraConfig(rank=64, init="pissa", target_modules=("k_proj",))
    with pytest.raises(
        ConfigError, match=r"lora.init=pissa: rank 64 of k_proj: expected at most \d+, since its weight is"
    ):
        attach(tiny_base, lora)
    with pytest.raises(ConfigError, match=r"lora.init=pissa: a quantised base: expected model.bits=16"):
        attach_lora(load(tiny_base, 4).model, config_of("pissa"), "base", 1)
