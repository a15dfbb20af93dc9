"""Training paths: packed or padded, planned from every batch of the run."""

from __future__ import annotations

import pytest
import torch

from finlora.model.base import load_base, quiet_bitsandbytes
from finlora.model.layers.packed_model import PackedLlama
from finlora.model.lora import attach_lora
from finlora.model.source import find_source
from finlora.train.path import make_sampler, plan_path, refuse_packing, take_path
from finlora.train.run.run_folder import load_training_set
from finlora.train.steps.batches import PackedBatches, PaddedBatches
from finlora.train.steps.loop import AnswerLoss

CPU = torch.device("cpu")


@pytest.fixture
def make_run(make_config):
    """Build a config of two workers and its examples."""

    def build(*overrides):
        config = make_config("train.num_workers=2", "train.micro_batch_size=2", "train.epochs=2", *overrides)
        return config, load_training_set(config).encoded

    return build


def plan_alone(config, examples, memory_gib):
    return plan_path(config, find_source(config.model).shape, examples, memory_gib)


def build_packs(config, examples, plan):
    """Every pack of every worker of the whole run."""
    batches = PackedBatches(
        max_tokens=plan.max_tokens,
        lengths=[item.num_tokens for item in examples],
        share_prefix=config.train.share_prefix,
        is_padded=config.train.device == "cuda",
    )
    sampler = make_sampler(config, examples)
    for step in range(min(config.train.max_steps or 10**9, sampler.steps_per_epoch * config.train.epochs)):
        batch = sampler.global_batch(step)
        for worker in range(sampler.world_size):
            for pack in batches.cut(sampler.share(batch, worker)):
                yield batches.assemble([examples[index] for index in pack])


@pytest.mark.parametrize("overrides", [[], ["train.share_prefix=false"], ["train.device=cuda"], ["train.max_steps=3"]])
@pytest.mark.parametrize("max_pack_tokens", [1, 150, 16384])
def test_largest_pack_is_the_largest_that_is_ever_built(make_run, overrides, max_pack_tokens):
    config, examples = make_run("data.max_train_examples=70", f"train.max_pack_tokens={max_pack_tokens}", *overrides)
    plan = plan_alone(config, examples, 1000.0)
    packs = list(build_packs(config, examples, plan))
    assert plan.size.num_rows == max(len(pack.input_ids) for pack in packs)
    assert plan.size.num_labels >= max((pack.targets >= 0).sum() for pack in packs)
    assert plan.max_tokens >= min(max_pack_tokens, max(item.num_tokens for item in examples))


def test_small_memory_makes_small_packs_that_fit(make_run):
    config, examples = make_run("train.global_batch_size=64")
    ample = plan_alone(config, examples, 1000.0)
    memory = ample.memory.train_peak_gib * 0.7
    small = plan_alone(config, examples, memory)
    assert small.memory.train_peak_gib <= memory
    assert small.size.num_rows <= ample.size.num_rows
    assert small.cost >= ample.cost
    least = plan_alone(config, examples, 1e-9)
    assert least.max_tokens == max(item.num_tokens for item in examples)
    assert least.memory.train_peak_gib > 1e-9


def test_reason_for_padded_rows_is_shown_from_config_alone(make_config):
    assert refuse_packing(make_config()) is None
    assert refuse_packing(make_config("train.packing=false")) == "train.packing=false"
    assert refuse_packing(make_config("lora.target_modules=[q_proj, down_proj]")) is None


def test_planned_path_is_taken(make_run):
    config, examples = make_run()
    with quiet_bitsandbytes():
        base = load_base(config.model, 16, CPU, 0)
    model = attach_lora(base.model, config.lora, config.model.base, 1)
    plan = plan_alone(config, examples, 1000.0)
    packed = take_path(model, config, examples, plan, CPU, 2)
    assert isinstance(packed.module, PackedLlama)
    assert isinstance(packed.batches, PackedBatches)
    assert (packed.module.recompute, packed.batches.max_tokens) == (plan.recompute, plan.max_tokens)
    padded = take_path(model, config, examples, None, CPU, 2)
    assert isinstance(padded.module, AnswerLoss)
    assert isinstance(padded.batches, PaddedBatches)


def test_batches_of_a_run_equal_those_sampled_one_by_one(make_run):
    config, examples = make_run()
    sampler = make_sampler(config, examples[:37])
    assert sampler.num_examples == 37
    steps = 2 * sampler.steps_per_epoch + 1
    assert list(sampler.batches(steps)) == [sampler.global_batch(step) for step in range(steps)]
