"""DoRA on every path against PEFT: served at each number of bits, in one batch with plain adapters, merged, and its files."""

from __future__ import annotations

import pytest
import torch
from family_bases import write_family_base
from safetensors.torch import load_file, save_file
from test_families import EXAMPLES, PROMPTS, assert_near, gradients_of, load, run_plain, run_stages

from finlora.config import ModelConfig, RunConfig, TrainConfig
from finlora.data.encode import collate
from finlora.engine.micro_batch import MicroBatch, Sample
from finlora.errors import AdapterError, ConfigError
from finlora.exchange.adopt import adopt
from finlora.formula.llama import PROJECTION_NAMES, shape_of
from finlora.formula.lora_config import LoraConfig
from finlora.model.base import quiet_bitsandbytes
from finlora.model.layers.packed_model import PackedLlama
from finlora.model.lora import attach_lora, load_adapter, save_adapter, trainable_parameters
from finlora.model.memory.fixed_memory import count_adapter_file_bytes, count_adapter_parameters
from finlora.model.merge import dequantise_base, merge_lora
from finlora.stage.stage import Stage
from finlora.train.path import refuse_packing
from finlora.train.steps.loop import AnswerLoss

DORA = LoraConfig(
    rank=3, alpha=7.0, dropout=0.0, dora=True, target_modules=PROJECTION_NAMES, rank_pattern={"k_proj": 2}
)
FAMILIES = ("llama", "qwen3 biased", "granite")
"""Without biases, with biases, and with a factor of the products that are added to the residual."""


@pytest.fixture(scope="module")
def settings_of(tiny_base, tmp_path_factory):
    def build(name):
        folder = tmp_path_factory.mktemp("dora") / "base"
        return ModelConfig(
            base=str(write_family_base(name, folder, tiny_base)), compute_dtype="float32", max_seq_len=256
        )

    return build


def adapt(net, lora=DORA, seed=5):
    """Put an adapter on a base, and change A, B and the row lengths as training does."""
    with quiet_bitsandbytes():
        model = attach_lora(net, lora, net.name_or_path, 1)
    torch.manual_seed(seed)
    for name, parameter in trainable_parameters(model).items():
        change = torch.randn_like(parameter) * 0.1
        parameter.data = parameter * (1 + change) if "magnitude" in name else change
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_served_adapter_equals_pefts(settings_of, name, bits, tmp_path):
    settings = settings_of(name)
    save_adapter(adapt(load(settings).model), tmp_path)
    base = load(settings, bits)
    # PEFT 0.21 loses the scales of 8-bit weights on a CPU: there its DoRA runs on the same weights, read back.
    plain = dequantise_base(base).model if bits == 8 else base.model
    before = run_plain(plain.train())
    adapted = load_adapter(
        plain, tmp_path
    ).train()  # in eval mode bitsandbytes packs 4-bit weights for a CPU's bfloat16
    expected = run_plain(adapted)
    assert float((expected[0] - before[0]).norm() / before[0].norm()) > 0.1
    rtol = 0.05 if bits == 8 else 1e-5  # at 8 bit the inputs are rounded too
    for num_stages in (1, 2):
        assert_near(run_stages(settings, num_stages, bits, tmp_path), expected, rtol)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_adapter_equals_pefts(settings_of, name, tmp_path):
    settings = settings_of(name)
    save_adapter(adapt(load(settings).model), tmp_path)
    adapted = load_adapter(load(settings).model, tmp_path)
    expected, merged = run_plain(adapted), load(settings)
    merge_lora(merged, tmp_path)
    assert_near(run_plain(merged.model), expected)
    assert_near(run_plain(adapted.merge_and_unload()), expected)


@pytest.mark.parametrize("fills", [False, True])
def test_batch_mixes_base_plain_and_dora(settings_of, tmp_path, fills):
    """Each row has the logits that it has alone, in eager passes and in those of a GPU's graphs."""
    settings = settings_of("qwen3 biased")
    adapters = {"plain": LoraConfig(rank=4, dropout=0.0, target_modules=PROJECTION_NAMES), "dora": DORA, "more": DORA}
    for seed, (name, lora) in enumerate(adapters.items()):
        save_adapter(adapt(load(settings).model, lora, seed), tmp_path / name)

    def run(names, loaded):
        stage = Stage(load(settings, is_bare=True).model, range(4), 512, torch.float32)
        stage.passes.fills = fills
        for name in loaded:
            stage.load_adapter(name, tmp_path / name)
        found = []
        for is_decode in (False, True):
            batch, start = MicroBatch(0), 0
            for name in names:
                ids, first = ([7], len(PROMPTS[0])) if is_decode else (PROMPTS[0], 0)
                row = batch.add(ids, first, range(start + first, start + first + len(ids)), [(start, first + len(ids))])
                batch.samples.append(Sample(row, 0.0, 1.0, 0, 0))
                batch.adapters.append((name, len(ids)))
                start += 40
            hidden = stage.forward(batch, None)
            logits = hidden if hidden.shape[1] == 512 and is_decode and fills else stage.compute_logits(hidden)
            found.append(logits.view(len(names), -1, logits.shape[1]))
        return found

    names = [None, "dora", "plain", "more", "dora"]
    together = run(names, ["plain", "dora", "more"])
    for index, name in enumerate(names):
        alone = run([name], [] if name is None else [name])
        assert_near([part[index] for part in together], [part[0] for part in alone])
    assert not torch.allclose(together[0][1], together[0][3], rtol=1e-2)


def test_unloaded_adapter_leaves_no_lengths(settings_of, tmp_path):
    settings = settings_of("llama")
    save_adapter(adapt(load(settings).model), tmp_path)
    stage = Stage(load(settings, is_bare=True).model, range(4), 64, torch.float32)
    stage.load_adapter("dora", tmp_path)
    number = stage.bank.numbers["dora"]
    out = torch.randn(1, stage.bank._gains[0, "qkv"].shape[1])
    assert not torch.equal(stage.bank.scale(out, torch.tensor([number]), 0, "qkv"), out)
    stage.unload_adapter("dora")
    assert torch.equal(stage.bank.scale(out, torch.tensor([number]), 0, "qkv"), out)


def test_files_and_forecast_hold_the_row_lengths(settings_of, tmp_path):
    model = adapt(load(settings_of("llama")).model)
    size = save_adapter(model, tmp_path)
    shape = shape_of(model.get_base_model().config.to_dict())
    assert round(size * 2**20) == count_adapter_file_bytes(shape, DORA)
    assert count_adapter_parameters(shape, DORA) == sum(each.numel() for each in trainable_parameters(model).values())
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {dtype for name, dtype in kinds.items() if "magnitude" in name} == {torch.float32}
    assert {dtype for name, dtype in kinds.items() if "magnitude" not in name} == {torch.bfloat16}
    assert DORA.variant == "DoRA; k_proj rank 2"


@pytest.mark.parametrize("bits", [16, 4])
def test_padded_path_trains_the_lengths(settings_of, bits):
    model = adapt(load(settings_of("llama"), bits).model).train()
    _, gradients = gradients_of(model, AnswerLoss(model), collate(EXAMPLES, 2))
    lengths = [each for name, each in zip(trainable_parameters(model), gradients, strict=True) if "magnitude" in name]
    assert len(lengths) == 4 * len(PROJECTION_NAMES)
    assert all(float(each.norm()) > 0 for each in lengths)
    with pytest.raises(ValueError, match="not one plain LoRA"):
        PackedLlama(model, torch.float32)
    assert refuse_packing(RunConfig(lora=DORA)) == "lora.dora=true, which scales the base's products too"


def test_pefts_own_folder_is_adopted_and_one_without_lengths_refused(settings_of, tmp_path):
    settings = settings_of("llama")
    model = adapt(load(settings).model).eval()
    model.save_pretrained(str(tmp_path / "given"))
    adopted = adopt(str(tmp_path / "given"), settings, tmp_path / "own", template="raw", bits=16)
    assert adopted.contract.lora_variant == "DoRA; k_proj rank 2"
    assert_near(run_stages(settings, 2, adapter=tmp_path / "own"), run_plain(model))
    path = tmp_path / "given" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "magnitude" in name)
    for change, words in (
        ({name: torch.ones(5)}, "with row lengths"),
        ({name: torch.ones(5, 2)}, "expected a vector of row lengths"),
        ({name: tensors[name] * float("nan")}, "infinite numbers or NaN"),
    ):
        save_file(tensors | change, path)
        with pytest.raises(AdapterError, match=words):
            adopt(str(tmp_path / "given"), settings, tmp_path / "other", template="raw", bits=16)
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(AdapterError, match="lacks 1 of the"):
        adopt(str(tmp_path / "given"), settings, tmp_path / "other", template="raw", bits=16)


def test_what_dora_cannot_go_with_is_refused():
    model, on_cpu = ModelConfig(bits=8), TrainConfig(device="cpu")
    with pytest.raises(
        ConfigError, match=r"lora\.dora=true with model\.bits=8 and train\.device=cpu: PEFT 0\.21 loses"
    ):
        RunConfig(lora=DORA, model=model, train=on_cpu)
    assert RunConfig(lora=DORA, model=model)
    assert RunConfig(lora=DORA, train=on_cpu)
    with pytest.raises(ConfigError, match=r"lora\.dora=true with init=pissa: expected one of them"):
        LoraConfig(dora=True, init="pissa")
