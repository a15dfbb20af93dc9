"""Real runs under Ray Train and DeepSpeed: two CPU workers on the tiny base, in as few runs as possible.

Each fit takes about 15 s, nearly all of it the start of two worker processes; so runs are made once a module.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
import torch
from runs import checkpoints_of, folder_of, losses_of, newest_checkpoint, weights_of
from safetensors.torch import load_file

from finlora.config import LoraConfig, ModelConfig
from finlora.configfile import config_to_tree, load_config
from finlora.data.encode import collate
from finlora.durable import hash_file
from finlora.errors import ResourceError
from finlora.model.adapter_files import hash_weights_and_settings
from finlora.model.contract import read_contract
from finlora.precision import resolve_training
from finlora.results import read_results
from finlora.train.run.attempts import read_attempts
from finlora.train.run.run_folder import load_training_set

pytestmark = pytest.mark.ray


def test_adapter_folder_explains_itself_and_opens_in_peft(quantised):
    from huggingface_hub import ModelCard
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, _ = quantised
    folder = folder_of(config).adapter
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "config.yaml", "finlora.yaml"}
    assert ModelCard.load(folder / "README.md").data.library_name == "peft"
    contract = read_contract(folder)
    assert (contract.variant, contract.template, contract.num_train_examples) == (
        "4bit-r4",
        "raw",
        len(load_training_set(config).encoded),
    )
    assert contract.data_hashes == load_training_set(config).hashes
    assert contract.metrics == {"loss_last": losses_of(config)[-1][1], "steps": 6.0}
    assert load_config(folder / "config.yaml") == resolve_training(config)
    net = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32)
    ids = torch.arange(20)[None] + 5
    with torch.inference_mode():
        before = net(ids).logits
        assert not torch.equal(PeftModel.from_pretrained(net, str(folder)).eval()(ids).logits, before)


def test_result_row_has_the_numbers_of_the_run(quantised):
    config, result = quantised
    (row,) = read_results(folder_of(config).results)
    assert dataclasses.replace(row, created="") == dataclasses.replace(result, created="")
    assert (row.kind, row.task, row.variant, row.bits) == ("training", "synthetic_sentiment", "4bit-r4", 4)
    assert row.loss_curve == [[float(step), loss] for step, loss in losses_of(config)]
    assert [step for step, _ in row.loss_curve] == [1, 2, 3, 4, 5, 6]
    assert row.metrics == {"loss_first": row.loss_curve[0][1], "loss_last": row.loss_curve[-1][1]}
    assert row.adapter_mib == (folder_of(config).adapter / "adapter_model.safetensors").stat().st_size / 2**20
    assert row.gpu_hours is None
    assert row.is_partial is True
    assert 0.1 < row.peak_memory_gib < 32
    assert row.tokens_per_second > 0
    assert row.config == config_to_tree(config)
    assert (row.run, row.attempts) == (config.name, 1)
    assert row.adapter_hash == hash_file(folder_of(config).adapter / "adapter_model.safetensors")
    assert row.base_hash == read_contract(folder_of(config).adapter).weights_hash
    (attempt,) = read_attempts(folder_of(config))
    assert (row.wall_seconds, row.waited_seconds) == (attempt.seconds, attempt.waited)
    num_elements = sum(
        tensor.numel() for tensor in load_file(newest_checkpoint(config) / "adapter.safetensors").values()
    )
    for wire in row.wire:
        assert (wire["rounds"], wire["bytes_sent"], wire["bytes_adam"]) == (6, 24 * num_elements, 24 * num_elements)
        assert 0 < wire["seconds"] < 60
    assert len(row.wire) == 2


def test_only_the_newest_checkpoints_stay(quantised):
    config, _ = quantised
    kept = checkpoints_of(config)
    assert [json.loads((path / "manifest-0.json").read_text())["step"] for path in kept] == [5, 6]
    assert {path.name for path in kept[-1].iterdir()} >= {
        "adapter.safetensors",
        "manifest-0.json",
        "manifest-1.json",
        "optimizer-0.pt",
        "optimizer-1.pt",
    }


def test_plan_says_how_the_run_trains_and_where_its_base_came_from(quantised):
    config, _ = quantised
    first, *_, last = folder_of(config).plan.read_text().splitlines()
    assert first.startswith("Training packed")
    assert re.fullmatch(r"Base: 0\.00 GiB at 4 bit, made from the model's files in \d+\.\d s\.", last)


def test_progress_reaches_tensorboard(quantised):
    assert [path.name for path in (folder_of(quantised[0]).root / "tensorboard").iterdir()] != []


def test_two_workers_equal_a_plain_adamw_loop(uninterrupted):
    """Against PEFT on transformers' own model with torch's AdamW, one process, whole padded batches, float32.

    The gradients agree to rounding (1e-6 relative); Adam divides by their root, so parameters agree to 1e-4 after six
    steps. The exported bf16 weights then differ by one rounding at most (2**-8 relative).
    """
    from finlora.model.base import load_base
    from finlora.model.lora import attach_lora, trainable_parameters
    from finlora.optim.optimizer import learning_rate_at
    from finlora.train.steps.sampler import Sampler

    config, _ = uninterrupted
    net = load_base(ModelConfig(base=config.model.base, compute_dtype="float32"), 16, torch.device("cpu"), 0).model
    model = attach_lora(net, LoraConfig(dropout=0.0), net.name_or_path, config.seed).train()
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.1)
    encoded = load_training_set(config).encoded
    sampler = Sampler(lengths=[1] * 11, global_batch_size=4, world_size=1, seed=config.seed)
    losses = []
    for step in range(6):
        batch = collate([encoded[index] for index in sampler.global_batch(step)], 0)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), config.optim.max_grad_norm)
        optimizer.param_groups[0]["lr"] = learning_rate_at(step, 6, config.optim)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert [loss for _, loss in losses_of(config)] == pytest.approx(losses, rel=1e-4)
    saved = load_file(newest_checkpoint(config) / "adapter.safetensors")
    assert saved.keys() == parameters.keys()
    for name, parameter in parameters.items():
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-3, atol=1e-4)
    exported = weights_of(config)
    for name, parameter in parameters.items():
        tensor = exported[name.replace(".default", "")]
        torch.testing.assert_close(tensor.float(), parameter.detach(), rtol=2**-7, atol=2e-4)


def test_gpu_that_the_cluster_lacks_is_refused_with_a_message(configure, ray_instance):
    from finlora.train.worker import run_training

    config = configure("name=on-gpu", "train.device=cuda", "train.gpus_per_worker=1")
    with pytest.raises(
        ResourceError, match=r"asks for 2 GPU \(2 workers x 1\), but the cluster has 0 .*train.device=cpu"
    ):
        run_training(config)
    assert not folder_of(config).root.exists()


def test_trained_adapter_goes_from_its_scores_to_an_approved_card(quantised, call, tmp_path):
    """What a user types, on a copy of the run: two evaluations, the card, the decision, the card again."""
    config, _ = quantised
    run = tmp_path / config.name
    shutil.copytree(folder_of(config).root, run, ignore=shutil.ignore_patterns("checkpoint*", "tensorboard"))
    adapter, card = run / "adapter", tmp_path / "card"
    before = hash_file(adapter / "finlora.yaml"), hash_weights_and_settings(adapter)
    tasks = "data.tasks=[synthetic_sentiment, synthetic_xbrl]"
    settings = [
        f"output_dir={tmp_path}",
        tasks,
        "data.max_test_examples=12",
        "eval.device=cpu",
        "eval.max_new_tokens=4",
    ]
    for words in (["--base"], ["--adapter", adapter]):
        code, out, error = call("evaluate", "--config", run / "config.yaml", *words, *settings)
        assert code == 0, error
    assert f"Scores written to {adapter / 'README.md'}" in out
    assert "| synthetic_sentiment, 8 bit, by labels | 12\\* |" in (adapter / "README.md").read_text()
    assert len([*(run / "answers").iterdir()]) == 4
    code, out, error = call("card", adapter, "--output", card)
    assert code == 0, error
    text = (card / "card.md").read_text()
    assert "synthetic_sentiment, 8 bit, by labels: right in " in out
    assert "synthetic_xbrl, 8 bit, by generate: right in " in out
    assert "there is no majority answer to compare with" in out
    assert "| synthetic_sentiment, 8 bit, by labels | its base |" in text
    assert "holds no training of exactly these weights" not in text
    assert "The base and tokenizer in" in text  # with the contract's hashes
    assert "the text above is without them" not in text  # the prompt is rendered by the base's tokenizer
    assert "nobody has approved it" in text
    code, out, _ = call(
        "approve", adapter, "--by", "A. Validator", "--decision", "approved", "--card", card / "card.html"
    )
    assert code == 0
    code, out, _ = call("card", adapter, "--output", card)
    assert "Approval: A. Validator approved these files on 20" in out
    assert "The last entry approves the adapter as it is now." in (card / "card.md").read_text()
    assert (hash_file(adapter / "finlora.yaml"), hash_weights_and_settings(adapter)) == before
