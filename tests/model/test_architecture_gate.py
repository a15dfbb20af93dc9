"""Gate of bases: what some path would ignore is refused by name; what every path computes equals transformers."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finlora.config import LoraConfig, ModelConfig
from finlora.data.encode import Encoded
from finlora.data.packing import pack_examples
from finlora.engine.admission import Limits
from finlora.engine.request import Request
from finlora.engine.scheduler import Scheduler
from finlora.errors import ModelError
from finlora.inference.in_process import InProcess
from finlora.model.base import load_base, measure_weights, quiet_bitsandbytes
from finlora.model.layers.packed_model import PackedLlama
from finlora.model.lora import attach_lora
from finlora.model.memory.fixed_memory import count_weight_bytes
from finlora.model.source import find_source, fingerprint_weights
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
IDS = torch.arange(30).reshape(1, 30) + 5
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def base(tiny_base, tmp_path):
    """A copy of the tiny base to change."""
    return shutil.copytree(tiny_base, tmp_path / "base")


def find(folder):
    return find_source(ModelConfig(base=str(folder)))


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def edit_tensors(folder, **changes):
    file = folder / "model.safetensors"
    save_file(load_file(file) | changes, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qkv_bias": True}, "qkv_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout=0.1. .* set it to 0 in a copy"),
        ({"sliding_window": 32}, "sliding_window=32"),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types=\['full_attention', 'sliding_attention'\]",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"auto_map": {"AutoModelForCausalLM": "own.Own"}}, "auto_map="),
        # Keys of Llama's relatives: Granite, MiniCPM, Gemma 2, SmolLM3, OLMo 2 and mixtures of experts.
        ({"embedding_multiplier": 12.0}, "embedding_multiplier=12.0. .* remove them from a copy"),
        ({"scale_emb": 12}, "scale_emb=12"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]"),
        ({"use_qk_norm": True}, "use_qk_norm=True"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"rope_interleaved": True}, "rope_interleaved=True"),
    ],
)
def test_key_that_no_path_computes_is_refused_by_its_name_and_value(base, changes, named):
    edit_config(base, **changes)
    with pytest.raises(ModelError, match=rf"needs what FinLoRA's Llama does not compute: {named}"):
        find(base)


def test_keys_that_change_no_number_are_taken(base):
    """Keys of configs on the hub: Llama 2 and 3, SmolLM2, unsloth's and mergekit's copies, and old versions' dumps."""
    edit_config(
        base,
        _name_or_path="bank/llama",
        torch_dtype="bfloat16",
        use_cache=False,
        unsloth_version="2025.1.1",
        unsloth_fixed=True,
        pretraining_tp=4,
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        is_llama_config=True,
        rope_interleaved=False,
        rope_scaling=None,
        sliding_window=None,
        use_sliding_window=False,
        layer_types=["full_attention"] * 2,
        eos_token_id=[1, 2],
        pruned_heads={},
        neftune_noise_alpha=5,
        chunk_size_feed_forward=0,
        repetition_penalty=1.1,
        resid_pdrop=0.0,
        embedding_multiplier=1.0,
        **{"transformers.js_config": {"dtype": "q4"}},
    )
    source = find(base)
    assert source.shape.num_layers == 2
    with torch.inference_mode():
        ours = load_base(ModelConfig(base=str(base), compute_dtype="float32"), 16, CPU, 0).model(IDS).logits
        assert torch.equal(ours, reference(base)(IDS).logits)


def reference(folder, **settings):
    """Load a folder with transformers, in float32."""
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **settings).eval()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPES = [
    {"rope_theta": 500000.0},
    {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    {"rope_parameters": {"rope_theta": 500000.0, **LLAMA3}},
    {"rope_theta": 10000.0, "rope_scaling": YARN},
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: str(rope.get("rope_scaling", rope))[:30])
def test_rotary_embedding_of_each_kind_and_spelling_equals_transformers(base, rope):
    """Requests of several lengths in one micro-batch, some longer than the base's context length."""
    edit_config(base, rope_scaling=None, rope_parameters=None, rope_theta=None)
    values = {key: value for key, value in json.loads((base / "config.json").read_text()).items() if value is not None}
    (base / "config.json").write_text(json.dumps(values | rope | {"max_position_embeddings": 64}))
    prompts = [tuple(range(5, 5 + length)) for length in (3, 20, 60)]
    plain, rows = reference(base), 512
    stage = Stage(
        load_base(ModelConfig(base=str(base), compute_dtype="float32"), 16, CPU, 0).model, range(2), rows, torch.float32
    )
    found = score_next(InProcess([stage]), prompts)
    with torch.inference_mode():
        for prompt, scores in zip(prompts, found, strict=True):
            expected = plain(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)[[7, 8]]
            assert scores == pytest.approx(expected.tolist(), abs=1e-4)
    default = reference(shutil.copytree(base, base.parent / "default"))
    assert default.config.rope_parameters["rope_type"] == (
        rope.get("rope_scaling") or rope.get("rope_parameters") or {}
    ).get("rope_type", (rope.get("rope_scaling") or {}).get("type", "default"))


def score_next(executor, prompts):
    """Return the log-probabilities of tokens 7 and 8 after each prompt, in one micro-batch."""
    from finlora.engine.engine import EngineCore

    limits = Limits(cache_rows=512, max_batch_tokens=512, max_in_flight=1)
    core = EngineCore(executor, Scheduler(limits, 1, lambda: 3), None)
    for index, prompt in enumerate(prompts):
        core.submit(Request(id=str(index), prompt_ids=prompt, choices=((7,), (8,))))
    answers = []
    while not core.is_idle:
        answers += core.step(lambda *_piece: None)
    return [answer.log_probs for answer in sorted(answers, key=lambda answer: answer.request_id)]


def test_heads_wider_than_the_hidden_size_parts_equal_transformers(base):
    """Four query heads of 32 on a hidden size of 64, which share one head of keys and values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    changes = {"head_dim": 32, "num_key_value_heads": 1, "initializer_range": 0.2, "tie_word_embeddings": False}
    torch.manual_seed(2)
    LlamaForCausalLM(LlamaConfig.from_pretrained(str(base), **changes)).save_pretrained(str(base))
    assert find(base).shape.projection("o_proj") == (64, 128)
    net = load_base(ModelConfig(base=str(base), compute_dtype="float32"), 16, CPU, 0).model
    (found,) = score_next(InProcess([Stage(net, range(2), 512, torch.float32)]), [tuple(range(5, 25))])
    with torch.inference_mode():
        expected = reference(base)(torch.arange(5, 25)[None]).logits[0, -1].log_softmax(-1)[[7, 8]]
    assert found == pytest.approx(expected.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        (
            {"type": "dynamic", "factor": 2.0},
            r"does not compute: .*'dynamic'.* Expected a rope_type of default, linear,",
        ),
        (
            {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            "does not compute: rope_type='longrope'",
        ),
        (
            {"rope_type": "linear", "factor": 2.0, "mrope_section": [2, 3, 3]},
            r"rope_type='linear', mrope_section=\[2, 3, 3\]",
        ),
        (
            {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
            "rope_type='linear', partial_rotary_factor=0.5",
        ),
        ({"rope_type": "linear"}, r"does not describe a Llama model .*Missing required keys .*factor"),
        ({"rope_type": "linear", "factor": "two"}, r"has invalid rope parameters \(\{'factor': 'two'"),
    ],
)
def test_rotary_embedding_that_depends_on_more_than_the_position_is_refused(base, rope, words):
    edit_config(base, rope_scaling=rope)
    with pytest.raises(ModelError, match=words):
        find(base)


def test_biases_of_files_and_config_must_agree(base):
    edit_config(base, attention_bias=True)
    with pytest.raises(ModelError, match=r"has no tensor model.layers.0.self_attn.q_proj.bias and 7 others"):
        find(base)
    edit_config(base, attention_bias=False)
    edit_tensors(base, **{"model.layers.0.self_attn.q_proj.bias": torch.ones(64)})
    words = (
        r"holds 1 tensors that FinLoRA does not compute with \(model.layers.0.self_attn.q_proj.bias\): biases, which"
    )
    with pytest.raises(ModelError, match=words):
        find(base)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_norm.weight", "norms of heads, which its model_type does not have"),
        ("score.weight", "a head of another task"),
        ("model.layers.0.mlp.up_proj.lora_A.weight", "an adapter inside the model: merge it with PEFT"),
        ("model.layers.0.mlp.up_proj.weight_scale", "quantised weights: give the 16-bit model"),
        ("model.layers.2.mlp.up_proj.weight", r"\(model.layers.2.mlp.up_proj.weight\)\. Its answers"),
    ],
)
def test_tensor_that_no_path_reads_is_named(base, name, words):
    edit_tensors(base, **{name: torch.ones(64)})
    with pytest.raises(ModelError, match=words):
        find(base)


def test_weights_of_another_type_are_refused(base):
    edit_tensors(base, **{"model.norm.weight": torch.ones(64, dtype=torch.int8)})
    with pytest.raises(
        ModelError, match=r"holds model.norm.weight as I8: expected F64, F32, F16, BF16. Give the 16-bit"
    ):
        find(base)


def test_tensors_under_other_names_are_reported_with_what_is_missing(base):
    file = base / "model.safetensors"
    save_file({name.removeprefix("model."): value for name, value in load_file(file).items()}, file)
    with pytest.raises(
        ModelError, match=r"has no tensor model.embed_tokens.weight and 19 others: .* They hold embed_tokens"
    ):
        find(base)


def test_config_of_endless_layers_is_refused_at_once(base):
    edit_config(base, num_hidden_layers=2**62)
    with pytest.raises(
        ModelError, match=r"holds 20 tensors and its config.json says num_hidden_layers=4611686018427387904"
    ):
        find(base)


def test_rotary_buffers_of_old_versions_are_taken(base, tiny_base):
    edit_tensors(base, **{f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in (0, 1)})
    settings = ModelConfig(base=str(base), compute_dtype="float32")
    with torch.inference_mode():
        found = load_base(settings, 16, CPU, 0).model(IDS).logits
        assert torch.equal(found, reference(tiny_base)(IDS).logits)


def test_file_that_transformers_reads_is_read(base, tiny_base):
    """With both, transformers prefers model.safetensors to shards with an index."""
    shard = "model-00001-of-00001.safetensors"
    tensors = {name: value + 1 for name, value in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / shard)
    index = {"weight_map": dict.fromkeys(tensors, shard)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fingerprint_weights(find(base)) == fingerprint_weights(find(tiny_base))
    (base / "model.safetensors").unlink()
    assert {path.name for path in find(base).shards.values()} == {shard}


def test_shards_that_hold_one_tensor_twice_are_refused(base):
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    for name in ("a.safetensors", "b.safetensors"):
        save_file(tensors, base / name)
    files = dict.fromkeys(tensors, "a.safetensors") | {EMBEDDING: "b.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(
        ModelError, match=r"b.safetensors holds lm_head|b.safetensors holds model\S*, which a.safetensors"
    ):
        find(base)


@pytest.fixture
def own_head(base):
    """A base whose config ties the head to the embedding, but whose file holds a separate head."""
    torch.manual_seed(0)
    edit_tensors(base, **{HEAD: (torch.randn(512, 64) * 0.3).bfloat16()})
    return base


def test_own_head_is_what_every_path_computes_with(own_head):
    settings = ModelConfig(base=str(own_head), compute_dtype="float32")
    source = find(own_head)
    assert (source.shape.is_tied, source.config.tie_word_embeddings) == (False, False)
    plain = reference(own_head)
    prompt = tuple(IDS[0].tolist())
    with torch.inference_mode():
        expected = plain(IDS).logits
    wanted = expected[0, -1].log_softmax(-1)[[7, 8]].tolist()
    with quiet_bitsandbytes():
        whole = load_base(settings, 16, CPU, 0).model
        with torch.inference_mode():
            assert torch.equal(whole(IDS).logits, expected)
        assert measure_weights(whole) == count_weight_bytes(source.shape, 16, 4)  # as the planner counts
        packed = PackedLlama(attach_lora(whole, LoraConfig(dropout=0.0), str(own_head), 0), torch.float32)
        loss = packed(pack_examples([Encoded(prompt, (7, 8))], share_prefix=False)).item()
        spans = (range(1), range(1, 2))
        nets = [load_base(settings, 16, CPU, 0, span).model for span in spans]
        stages = [Stage(net, span, 512, torch.float32) for net, span in zip(nets, spans, strict=True)]
    (found,) = score_next(InProcess(stages), [prompt])
    assert found == pytest.approx(wanted, abs=1e-5)
    with torch.inference_mode():
        last = plain(torch.tensor([[*prompt, 7]])).logits[0, -1].log_softmax(-1)
    assert loss == pytest.approx(-(wanted[0] + last[8].item()), abs=1e-4)
    # An adapter of a version that never read the head was trained on another base.
    tied = dataclasses.replace(source, has_own_head=False)
    assert fingerprint_weights(tied) != fingerprint_weights(source)


@pytest.mark.parametrize("bits", [8, 4])
def test_own_head_is_kept_in_the_cache_of_quantised_bases(own_head, tmp_path, bits):
    settings = ModelConfig(base=str(own_head), compute_dtype="float32", cache=str(tmp_path / "cache"))
    with quiet_bitsandbytes(), torch.inference_mode():
        written, read = (load_base(settings, bits, CPU, 0) for _ in range(2))
        assert (written.is_cached, read.is_cached) == (False, True)
        head = load_file(own_head / "model.safetensors")[HEAD].float()
        assert torch.equal(written.model.lm_head.weight, head)
        assert torch.equal(read.model.lm_head.weight, head)
        assert torch.equal(read.model(IDS).logits, written.model(IDS).logits)


def test_head_that_is_a_copy_of_the_embedding_is_tied_as_transformers_ties_it(base):
    edit_tensors(base, **{HEAD: load_file(base / "model.safetensors")[EMBEDDING].clone()})
    assert find(base).shape.is_tied
    net = load_base(ModelConfig(base=str(base)), 16, CPU, 0).model
    assert net.lm_head.weight is net.model.embed_tokens.weight
    theirs = reference(base)
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    # A replaced file is compared again.
    edit_tensors(base, **{HEAD: torch.zeros(512, 64, dtype=torch.bfloat16)})
    assert not find(base).shape.is_tied
