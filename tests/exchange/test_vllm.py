"""Models requantised for vLLM: packed as the library reads them, checked by transformers, kept only if the answers agree."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("compressed_tensors", reason="needs the extra vllm")

from finlora.config import LoraConfig, ModelConfig
from finlora.errors import ConfigError, ModelError
from finlora.evaluate.parity_report import read_parity
from finlora.exchange import vllm
from finlora.exchange.compressed import find_scales, requantise
from finlora.exchange.vllm import export_vllm
from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.contract import make_contract, read_contract, write_contract
from finlora.model.lora import attach_lora, save_adapter, trainable_parameters

CPU = torch.device("cpu")
IDS = torch.arange(60).reshape(3, 20) + 5
TASK = "synthetic_sentiment"


@pytest.fixture(scope="module")
def adapter(tiny_base, tmp_path_factory):
    """An adapter trained at 4 bit."""
    folder = tmp_path_factory.mktemp("vllm") / "adapter"
    lora = LoraConfig(rank=4)
    with quiet_bitsandbytes():
        base = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 4, CPU, 0)
        model = attach_lora(base.model, lora, base.model.name_or_path, 1)
        torch.manual_seed(7)
        for parameter in trainable_parameters(model).values():
            parameter.data = (torch.randn_like(parameter) * 0.05).bfloat16().to(parameter.dtype)
        size = save_adapter(model, folder)
    write_contract(folder, make_contract(base, str(tiny_base), lora, "raw", {TASK: "0" * 16}, 10, size, {}))
    return folder


@pytest.fixture
def export(adapter, make_config, tmp_path):
    def run(*, bits=8, min_agreement=0.5):
        return export_vllm(
            make_config(),
            adapter,
            tmp_path / "out",
            bits=bits,
            limit=12,
            min_agreement=min_agreement,
            on_progress=lambda *_: None,
        )

    return run


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 32)])
def test_transformers_computes_with_the_rounded_weights(tiny_base, tmp_path, bits, group):
    """W' = step * round(W / step) within [-2^(bits - 1), 2^(bits - 1) - 1], everything else as it was."""
    from transformers import AutoModelForCausalLM

    requantise(tiny_base, tmp_path, bits)
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_base), dtype=torch.float32).eval()
    top, changed = 2 ** (bits - 1) - 1, 0
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in name:
            weight = module.weight.data
            steps = find_scales(weight.bfloat16(), bits, group).repeat_interleave(group or weight.shape[1], 1)
            rounded = (weight / steps).round().clamp(-top - 1, top) * steps
            assert 0 < (rounded - weight).norm() / weight.norm() < {8: 0.02, 4: 0.15}[bits]
            module.weight.data = rounded
            changed += 1
    assert changed == 14
    with vllm._load(tmp_path, CPU, torch.float32) as packed, torch.inference_mode():
        expected, found = plain(IDS).logits, packed(IDS).logits
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    before, after = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    untouched = {name for name in before if not name.endswith("proj.weight")}
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    assert "model.layers.0.self_attn.q_proj.weight_packed" in after
    assert after["model.layers.0.self_attn.q_proj.weight_packed"].shape == (64, 64 * bits // 32)


def test_steps_of_4_bit_have_less_error_than_those_that_cut_nothing():
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()

    def error(steps):
        groups = weight.float().unflatten(1, (-1, 32))
        return (((groups / steps[..., None]).round().clamp(-8, 7) * steps[..., None] - groups) ** 2).sum()

    whole = (weight.float().unflatten(1, (-1, 32)).abs().amax(2) / 7).bfloat16().float()
    assert error(find_scales(weight, 4, 32)) < 0.97 * error(whole)
    assert bool(torch.isfinite(find_scales(torch.zeros(2, 32), 4, 32)).all())


def test_export_is_checked_against_the_form_of_the_training_and_says_so_beside_both(export, adapter, tmp_path):
    (row,) = export()
    # Weights are rounded to bfloat16, then to int8: a small step, answered by transformers instead of the engine.
    assert row.form == "exported for vLLM, 8 bit, whole rows"
    assert row.max_difference < 0.05
    assert (row.num_rows, row.trained_bits, row.bits) == (12, 4, None)
    assert row in read_parity(adapter)
    assert row.base_hash != read_contract(adapter).weights_hash  # of the model that answered
    assert '"quant_method": "compressed-tensors"' in (tmp_path / "out" / "config.json").read_text()
    assert "exported: exported for vLLM, 8 bit, whole rows" in (tmp_path / "out" / "merged.yaml").read_text()
    assert "exported for vLLM" in (tmp_path / "out" / "parity.json").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ModelError, match="out exists and is not empty: give another folder for the export"):
        export()


def test_export_whose_answers_differ_is_not_kept(export, tmp_path, monkeypatch):
    answer_all = vllm.answer_works

    def answer_otherwise(*arguments):
        (answers,) = answer_all(*arguments)
        return [answers._replace(texts=["other"] * len(answers.texts))]

    monkeypatch.setattr(vllm, "answer_works", answer_otherwise)
    words = r"at 4 bit the export gives the answer of the training in 0\.0 \(0\.0–24\.2\) % of 12 rows of .*--bits 8, or lower"
    with pytest.raises(ModelError, match=words):
        export(bits=4)
    assert list(tmp_path.iterdir()) == []


def test_plain_engine_writes_the_most_probable_tokens_up_to_the_end(tiny_base):
    from finlora.model.tokenizer import load_tokenizer

    tokenizer, prompt, seen = load_tokenizer(tiny_base), [5, 9, 30], []
    with vllm._load(tiny_base, CPU, torch.float32) as model:
        ids = torch.tensor([prompt])
        for _ in range(6):
            with torch.inference_mode():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        expected = ids[0, len(prompt) :]
        end = int(expected[-1])
        engine = vllm._PlainEngine(model, end, tokenizer)
        (text,) = engine.generate([prompt], 6, seen.append)
    before = expected[: expected.tolist().index(end) + 1]
    assert text == tokenizer.decode(before, skip_special_tokens=True)
    assert seen == [1]


def test_inputs_that_no_group_divides_are_refused_at_4_bit(tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "packed").mkdir()
    save_file({"model.layers.0.mlp.down_proj.weight": torch.ones(8, 40)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"down_proj.weight has 40 inputs, and 4 bit needs a multiple of 32: .*--bits 8"
    ):
        requantise(tmp_path, tmp_path / "packed", 4)


def test_missing_library_and_wrong_options_are_named(export, adapter, call, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(ConfigError, match=r"compressed-tensors is not installed.*pip install 'finlora\[vllm\]'"):
        export()
    for words in (("--bits", "5", "--output", tmp_path / "o"), (), ("--to", "x", "--output", tmp_path / "o")):
        code, _, err = call("export", "vllm", adapter, *words)
        assert (code, "export vllm takes --output FOLDER, --bits 8 or 4" in err) == (2, True)
    code, _, err = call("export", "mlflow", adapter, "--output", tmp_path / "o")
    assert (code, "export mlflow takes no settings and no --output" in err) == (2, True)
