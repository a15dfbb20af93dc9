"""PEFT adapters of other programs: made here by PEFT alone, adopted, and then used like FinLoRA's own."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import warnings

import pytest
import torch
import yaml
from letters import write_letters
from safetensors.torch import load_file, save_file

from finlora.config import ModelConfig
from finlora.durable import seal
from finlora.errors import AdapterError, ConfigError
from finlora.exchange.adopt import adopt
from finlora.model.contract import read_contract, read_tasks

IDS = torch.arange(40).reshape(2, 20) + 5


@pytest.fixture(scope="module")
def foreign(tiny_base, tmp_path_factory):
    """A folder as PEFT's save_pretrained writes it, in the settings of the published FinLoRA adapters."""
    import peft
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("foreign") / "lora-fpb"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
        targets = ["q_proj", "k_proj", "v_proj"]
        settings = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(net, settings)
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.05)
        model.save_pretrained(folder)
    with torch.inference_mode():
        logits = model.eval()(IDS).logits
    return folder, logits


@pytest.fixture
def change(foreign, tmp_path):
    """Copy the folder with other settings."""

    def make(**settings):
        folder = tmp_path / "given"
        shutil.copytree(foreign[0], folder)
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return make


@pytest.fixture
def take(tiny_base, tmp_path):
    """Adopt a folder on the tiny base."""

    def run(folder, *, base=tiny_base, tokenizer=None, template=None, bits=None, tasks=(), **options):
        model = ModelConfig(base=str(base), tokenizer=tokenizer, template=template or "raw")
        return adopt(str(folder), model, tmp_path / "own", template=template, bits=bits, tasks=tasks, **options)

    return run


def test_adopted_adapter_is_the_given_one_and_its_contract_names_what_is_unknown(foreign, take, tiny_base):
    from finlora.model.base import load_base
    from finlora.model.lora import load_adapter

    given, logits = foreign
    before = {path.name: path.read_bytes() for path in given.iterdir()}
    adopted = take(given)
    assert {path.name: path.read_bytes() for path in given.iterdir()} == before
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (adopted.folder / name).read_bytes() == before[name]
    contract = read_contract(adopted.folder)
    assert (contract.bits, contract.template, contract.num_train_examples, contract.data_hashes) == (
        None,
        None,
        None,
        {},
    )
    assert (contract.rank, contract.alpha, contract.variant) == (8, 16.0, "adopted-r8")
    assert contract.adopted.source == "lora-fpb"
    assert contract.adopted.unknown == [
        "rows of the training data and their number",
        "bits of the base in training",
        "prompt template (raw or chat)",
        "wording of the training prompts",
    ]
    written = yaml.safe_load((adopted.folder / "config.yaml").read_text())
    assert written["model"] == {"base": str(tiny_base)}
    assert "train" not in written
    # PEFT's own numbers, in the same type.
    base = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 16, torch.device("cpu"), 0)
    with torch.inference_mode():
        ours = load_adapter(base.model, adopted.folder)(IDS).logits
    assert (ours - logits).abs().max() < 1e-5 * logits.abs().max()


def test_stated_facts_are_recorded_and_no_longer_unknown(foreign, take, dated_base):
    adopted = take(foreign[0], base=dated_base, template="chat", bits=8, tasks=["fpb"])
    contract = adopted.contract
    assert (contract.template, contract.bits, contract.quantisation) == ("chat", 8, "LLM.int8")
    assert (contract.variant, contract.task_names, contract.template_date) == ("8bit-r8", ["fpb"], "2024-07-26")
    assert contract.adopted.unknown == [
        f"whether the base given is {contract.adopted.base_named}, which it names (the shapes fit)",
        "rows of the training data and their number",
        "date in the training prompts (2024-07-26 is used)",
    ]


@pytest.mark.parametrize(
    ("settings", "rewritten"),
    [
        # as PEFT 0.2 wrote them, and a setting of tomorrow that is off
        ({"enable_lora": None, "merge_weights": False, "use_tomorrows": False, "peft_version": "0.99"}, []),
        ({"task_type": None, "auto_mapping": {"base_model_class": "LlamaForCausalLM"}}, ["auto_mapping"]),
        ({"init_lora_weights": "gaussian"}, ["init_lora_weights"]),
        ({"init_lora_weights": False}, ["init_lora_weights"]),
        ({"target_modules": ".*\\.(q_proj|k_proj|v_proj)$"}, ["target_modules"]),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "c_attn"]}, ["target_modules"]),
        ({"exclude_modules": ["lm_head"]}, ["exclude_modules"]),
    ],
)
def test_settings_of_other_versions_with_the_same_effect_are_accepted(change, take, settings, rewritten):
    adopted = take(change(**settings))
    assert adopted.contract.adopted.rewritten == rewritten
    assert adopted.contract.target_modules == ["q_proj", "k_proj", "v_proj"]
    read_contract(adopted.folder).check_files(adopted.folder)


@pytest.fixture
def logits_of(tiny_base):
    """PEFT's logits from an adapter's folder, in float32."""
    import peft
    from transformers import LlamaForCausalLM

    def run(folder):
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            net = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
            return peft.PeftModel.from_pretrained(net, folder).eval()(IDS).logits

    return run


def test_rank_stabilised_adapter_becomes_a_plain_one_of_the_same_scale(change, take, logits_of):
    """alpha / sqrt(rank) is (alpha sqrt(rank)) / rank: PEFT computes the same from both folders."""
    given = change(use_rslora=True)
    adopted = take(given)
    assert adopted.contract.adopted.rewritten == ["lora_alpha", "use_rslora"]
    assert adopted.contract.alpha == pytest.approx(16 * 8**0.5)
    expected, found = logits_of(given), logits_of(adopted.folder)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    path = given / "adapter_config.json"  # the scale taken out has an effect
    path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": False}))
    assert (logits_of(given) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_rank_stabilised_adapter_keeps_the_scales_of_single_projections(change, take, logits_of):
    given = change(use_rslora=True, alpha_pattern={"q_proj": 48}, rank_pattern={"k_proj": 8})
    adopted = take(given)
    assert adopted.contract.adopted.rewritten == ["alpha_pattern", "lora_alpha", "use_rslora"]
    lora = yaml.safe_load((adopted.folder / "config.yaml").read_text())["lora"]
    assert lora["alpha_pattern"] == pytest.approx({"q_proj": 48 * 8**0.5, "k_proj": 16 * 8**0.5})
    assert lora["rank_pattern"] == {"k_proj": 8}
    expected = logits_of(given)
    assert (logits_of(adopted.folder) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": "yes"}, r"given/adapter_config.json is not plain LoRA \(use_dora='yes'\)"),
        ({"init_lora_weights": "pissa"}, r"is not plain LoRA \(init_lora_weights='pissa'\)"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights='pissa_niter_4'"),
        ({"r": 4}, r"given/adapter_model.safetensors holds .* as F32 \[8, 64\]: expected lora_A \(4, in\)"),
    ],
)
def test_other_formulas_are_refused_by_name_and_leave_nothing(change, take, tmp_path, settings, words):
    with pytest.raises(AdapterError, match=words):
        take(change(**settings))
    assert [path.name for path in tmp_path.iterdir()] == ["given"]


def test_trained_embedding_is_refused_by_its_tensor(change, take):
    folder = change()
    path = folder / "adapter_model.safetensors"
    name = "base_model.model.model.embed_tokens.weight"
    save_file(load_file(path) | {name: torch.zeros(513, 64)}, path)
    with pytest.raises(
        AdapterError, match=rf"holds 1 tensor that are no LoRA pair, such as {name}: .*tokens were added"
    ):
        take(folder)


def test_adapter_of_another_shape_is_refused(change, take):
    folder = change()
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight": torch.zeros(8, 64)}, path)
    with pytest.raises(AdapterError, match=r"has 1 tensors that no layer of the base takes, such as .*layers\.2\."):
        take(folder)


def test_pickle_is_refused_with_a_command_that_converts_it(foreign, change, take, monkeypatch):
    folder = change()
    tensors = load_file(folder / "adapter_model.safetensors")
    torch.save(tensors, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"holds adapter_model\.bin, a pickle, which can run code") as refused:
        take(folder)
    python, dash, code, *files = shlex.split(str(refused.value).split("runs no code: ")[1])
    assert (python, dash) == ("python", "-c")
    assert "weights_only=True" in code
    monkeypatch.setattr(sys, "argv", ["-c", *files])
    exec(code, {})
    converted = load_file(folder / "adapter_model.safetensors")
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())
    assert take(folder).contract.rank == 8


def test_base_of_another_name_is_refused_unless_it_is_said_to_be_the_same(change, take, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "mirror.json").write_text(json.dumps(seal({"repository": "meta-llama/Llama-3.1-8B", "commit": "c" * 40})))
    folder = change(base_model_name_or_path="meta-llama/Meta-Llama-3.1-8B")
    words = r"names meta-llama/Meta-Llama-3.1-8B as its base, and --base is meta-llama/Llama-3.1-8B: .*--other-base"
    with pytest.raises(AdapterError, match=words):
        take(folder, base=base)
    adopted = take(folder, base=base, is_other_base=True)
    assert adopted.contract.adopted.unknown[0] == (
        "whether meta-llama/Llama-3.1-8B has the weights of meta-llama/Meta-Llama-3.1-8B, which it names (the shapes fit)"
    )
    assert adopted.contract.adopted.base_named == "meta-llama/Meta-Llama-3.1-8B"


def test_tokenizer_beside_it_must_be_the_bases(change, take, tiny_base, tmp_path):
    folder = change()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny_base / name, folder / name)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    assert "the 512 tokens of its tokenizer" in take(folder).agreed
    shutil.rmtree(tmp_path / "own")
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("[{{ messages[0]['content'] }}]")
    with pytest.raises(
        AdapterError, match=r"brings another chat template than the base's tokenizer: .*--tokenizer .*given"
    ):
        take(folder, base=base, template="chat")
    adopted = take(folder, base=base, template="chat", tokenizer=str(folder))
    assert yaml.safe_load((adopted.folder / "config.yaml").read_text())["model"]["tokenizer"] == str(folder)
    shutil.rmtree(tmp_path / "own")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    added = {"id": 512, "content": "[PAD]", "special": True}
    tokenizer["added_tokens"].append(added | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        AdapterError, match=r"brings a tokenizer of 513 tokens, the base's has 512; they differ in 1 token, such as"
    ):
        take(folder)


def test_source_that_is_not_here_is_refused_with_what_to_do(foreign, take, tmp_path):
    words = (
        r"FinGPT/lora is not in the local hub cache .*\(HF_HUB_OFFLINE is set\).*"
        r"`finlora prefetch --adapters FinGPT/lora --output MIRROR`.* give MIRROR/adapters/FinGPT/lora"
    )
    with pytest.raises(AdapterError, match=words):
        take("FinGPT/lora")
    with pytest.raises(AdapterError, match=r"\./absent is neither a folder here nor a hub id"):
        take("./absent")
    with pytest.raises(ConfigError, match=r"--task 'fbp' is not a task: did you mean fpb\? A task of your own"):
        take(foreign[0], tasks=["fbp"])
    adopted = take(foreign[0])
    with pytest.raises(ConfigError, match=r"own: it is not empty\. Give a new folder"):
        take(foreign[0])
    renamed = adopted.folder.rename(tmp_path / "mine")
    with pytest.raises(AdapterError, match=r"mine has its finlora.yaml already: use it as it is"):
        take(renamed)


def test_folder_of_the_hub_cache_is_read_through_its_links(change, take, tmp_path):
    """Layout of huggingface_hub's cache: snapshots/COMMIT/NAME links to blobs/HASH."""
    folder, cache = change(), tmp_path / "models--bank--lora"
    (cache / "snapshots" / ("c" * 40)).mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in folder.iterdir():
        shutil.copyfile(path, cache / "blobs" / path.name)
        (cache / "snapshots" / ("c" * 40) / path.name).symlink_to(f"../../blobs/{path.name}")
    adopted = take(cache / "snapshots" / ("c" * 40))
    assert adopted.contract.rank == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "models--bank--lora", "own"]
    shutil.rmtree(adopted.folder)
    (cache / "blobs" / "adapter_config.json").write_text('{"use_dora": true}')
    with pytest.raises(AdapterError, match=r"snapshots/c+/adapter_config.json is not plain LoRA"):
        take(cache / "snapshots" / ("c" * 40))


def test_mirrored_adapter_is_named_by_hub_id_and_commit(change, take):
    folder = change()
    (folder / "mirror.json").write_text(json.dumps(seal({"repository": "FinGPT/lora", "commit": "c" * 40})))
    assert take(folder).contract.adopted.source == f"FinGPT/lora@{'c' * 40}"


@pytest.mark.parametrize("name", ["mirror.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_pipes_and_foreign_links_beside_it_are_refused(change, take, tiny_base, tmp_path, name):
    folder = change()
    shutil.copyfile(tiny_base / "tokenizer.json", folder / "tokenizer.json")
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(AdapterError, match=rf"given/{name} is not a regular file"):
        take(folder, base=base, template="chat")
    (folder / name).unlink()
    (folder / name).symlink_to(tiny_base / "tokenizer.json")
    with pytest.raises(AdapterError, match=rf"given/{name} is a link to a file outside of the folder"):
        take(folder, base=base, template="chat")


def test_task_file_comes_with_the_adapter(foreign, take, tmp_path):
    adopted = take(foreign[0], tasks=[str(write_letters(tmp_path / "letters"))])
    contract = read_contract(adopted.folder)
    assert contract.task_names == ["letters"]
    assert read_tasks(adopted.folder, contract)["letters"].choices == ("bad", "good")


def test_contract_without_a_reason_for_null_is_refused(foreign, take):
    folder = take(foreign[0]).folder
    values = yaml.safe_load((folder / "finlora.yaml").read_text()) | {"adopted": None}
    del values["sha256"]
    (folder / "finlora.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(AdapterError, match="template, bits or num_train_examples is null, and `adopted` does not say"):
        read_contract(folder)


@pytest.fixture
def adopted(foreign, take):
    return take(foreign[0], tasks=["synthetic_sentiment"]).folder


UNKNOWN = (
    "Another program trained it (lora-fpb). Unknown: rows of the training data and their number; bits of the base in training; "
    "prompt template (raw or chat)."
)


def test_verbs_use_it_and_say_what_is_unknown(adopted, tiny_base, prepared_synthetic, call, tmp_path):
    settings = (
        "--config",
        adopted / "config.yaml",
        f"data.dir={prepared_synthetic}",
        f"output_dir={tmp_path / 'runs'}",
    )
    settings += ("eval.device=cpu", "eval.bits=16", "model.compute_dtype=float32", "data.max_test_examples=4")
    code, out, err = call("evaluate", "--adapter", adopted, *settings)
    assert code == 0, err
    assert UNKNOWN in out
    code, out, err = call("ask", "Profit rose", "--task", "fpb", "--adapter", adopted, *settings)
    assert code == 0, err
    assert UNKNOWN in err
    code, _, err = call("merge", "--adapter", adopted, "--output", tmp_path / "merged")
    assert "was trained at unknown bits of the base, but a merge uses the 16-bit one" in err
    code, out, err = call("merge", "--adapter", adopted, "--output", tmp_path / "merged", "--allow-other-bits")
    assert code == 0, err
    assert UNKNOWN in out
    record = yaml.safe_load((tmp_path / "merged" / "merged.yaml").read_text())
    assert record["contract"]["adopted"]["source"] == "lora-fpb"
    code, out, err = call("card", adopted, "--output", tmp_path / "card", "--results", tmp_path / "runs")
    assert code == 0, err
    written = (tmp_path / "card" / "card.md").read_text()
    for gap in (
        "- Adapter: bits of the base in training",
        "- Training: settings: another program trained it (lora-fpb)",
        "train split: the rows that another program trained it on are unknown",
    ):
        assert gap in written
    assert "learning rate" not in written


def test_verb_says_what_was_checked_and_what_to_type_next(foreign, tiny_base, call, tmp_path):
    words = ("adopt", foreign[0], "--base", tiny_base, "--output", tmp_path / "own")
    code, out, err = call(*words, "--bits", "5")
    assert (code, "found --bits 5: expected 16, 8 or 4" in err) == (2, True)
    code, out, err = call(*words, "--bits", "4", "--template", "raw", "--task", "fpb")
    assert code == 0, err
    assert "Adopted lora-fpb: rank 8, alpha 16, on q_proj, k_proj, v_proj of" in out
    assert "Checked: 12 tensors in the names, ranks and shapes of the base" in out
    assert f"Next: finlora evaluate --config {tmp_path}/own/config.yaml --adapter {tmp_path}/own" in out
