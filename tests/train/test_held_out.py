"""The held-out loss equals the plain mean over answer tokens for any batches and workers, and does not change the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finlora.data.encode import collate, encode_examples
from finlora.data.sets.prepared import read_prepared
from finlora.model.base import load_base
from finlora.model.base_files import read_base_files
from finlora.model.lora import attach_lora
from finlora.model.tokenizer import load_tokenizer
from finlora.train import held_out as module
from finlora.train.held_out import HeldOut, read_held_out
from finlora.train.run.run_folder import RunFolder
from finlora.train.steps.loop import AnswerLoss

CPU = torch.device("cpu")


@pytest.fixture
def model(make_config):
    config = make_config("lora.dropout=0.5")
    base = load_base(config.model, 16, CPU, 0).model
    torch.manual_seed(5)
    model = attach_lora(base, config.lora, config.model.base, 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return model.train()


def plain_sums(config, model):
    """Loss and answer tokens, one example at a time."""
    examples = read_prepared(Path(config.data.dir), "synthetic_sentiment", "test").examples[
        : config.data.max_test_examples
    ]
    tokenizer = load_tokenizer(Path(config.model.base))
    encoded, _ = encode_examples(examples, tokenizer, template="raw", max_seq_len=8192, too_long="error")
    model.eval()
    with torch.no_grad():
        losses = [float(AnswerLoss(model)(collate([item], 0))) for item in encoded]
    return sum(losses), sum(len(item.answer_ids) for item in encoded)


def test_loss_equals_one_example_at_a_time_and_is_kept(make_config, model, tmp_path, monkeypatch):
    config, run = make_config(), RunFolder(tmp_path)
    loss, count = plain_sums(config, model)
    monkeypatch.setattr(module, "_MAX_TOKENS", 300)
    model.train()
    state = torch.get_rng_state()
    measured = HeldOut(config, read_base_files(config.model), run, 0, 1, lambda sums: sums).measure(12, model, CPU)
    assert measured == pytest.approx(loss / count, rel=1e-5)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert read_held_out(run) == [{"step": 12, "held_out_loss": measured}]


def test_limit_of_test_examples_holds_for_the_loss_as_for_the_scores(make_config, model, tmp_path):
    config, parts = make_config("data.max_test_examples=7"), []
    expected = plain_sums(config, model)
    assert expected[1] < plain_sums(make_config(), model)[1]

    def keep(sums):
        parts.append(sums.clone())
        return sums

    HeldOut(config, read_base_files(config.model), RunFolder(tmp_path), 0, 1, keep).measure(3, model, CPU)
    assert parts[0].tolist() == pytest.approx(expected, rel=1e-5)


def test_workers_share_the_examples_and_only_the_first_writes(make_config, model, tmp_path):
    config, run = make_config(), RunFolder(tmp_path)
    loss, count = plain_sums(config, model)
    parts = []

    def keep(sums):
        parts.append(sums.clone())
        return sums

    HeldOut(config, read_base_files(config.model), run, 1, 2, keep).measure(3, model, CPU)
    assert read_held_out(run) == []
    HeldOut(config, read_base_files(config.model), run, 0, 2, keep).measure(3, model, CPU)
    total = parts[0] + parts[1]
    assert total.tolist() == pytest.approx([loss, count], rel=1e-5)
    assert 0.3 < float(parts[0][1] / total[1]) < 0.7
