"""Real runs under Ray Train and DeepSpeed: two CPU workers on the tiny base, in as few fits as tell everything.

Each fit takes about 15 s, nearly all of it the start of two worker processes; so runs are made once a module.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finlora.config import LoraConfig, ModelConfig
from finlora.configfile import config_to_tree, load_config
from finlora.data.encode import collate
from finlora.errors import CheckpointError, ResourceError, StoppedError
from finlora.model.contract import read_contract
from finlora.results import read_results
from finlora.train.run import RunFolder, load_training_set, read_progress

pytestmark = pytest.mark.ray

EXACT = [
    "model.bits=16",
    "model.compute_dtype=float32",
    "train.precision=fp32",
    # 11 examples in batches of 4: the last batch gives one worker two examples and the other one.
    "data.max_train_examples=11",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.epochs=2",
    "train.checkpoint_every_steps=2",
    "optim.learning_rate=0.01",
    "optim.weight_decay=0.1",
]


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def configure(tiny_base, prepared_synthetic, output):
    """Build the config of a run of two CPU workers that logs each step."""
    defaults = [
        f"model.base={tiny_base}",
        f"data.dir={prepared_synthetic}",
        "data.tasks=[synthetic_sentiment]",
        f"output_dir={output}",
        "train.device=cpu",
        "train.num_workers=2",
        "train.cpus_per_worker=0.5",
        "train.log_every_steps=1",
        "train.max_failures=1",
        "lora.dropout=0.0",
    ]

    def build(*overrides):
        return load_config(None, [*defaults, *overrides])

    return build


@pytest.fixture(scope="module")
def quantised(configure, ray_instance):
    """A 4-bit run in bf16 of six steps that keeps two of its checkpoints; each second batch leaves a worker nothing."""
    from finlora.train.worker import run_training

    config = configure(
        "name=four-bit",
        "model.bits=4",
        "lora.dropout=0.1",
        "train.max_steps=6",
        "train.epochs=3",
        "data.max_train_examples=9",
        "train.global_batch_size=8",
        "train.checkpoint_every_steps=1",
        "train.keep_checkpoints=2",
        "train.max_failures=0",
        "optim.learning_rate=0.01",
    )
    return config, run_training(config)


@pytest.fixture(scope="module")
def uninterrupted(configure, ray_instance):
    from finlora.train.worker import run_training

    config = configure("name=whole", *EXACT)
    return config, run_training(config)


def folder_of(config):
    return RunFolder(Path(config.output_dir) / config.name)


def weights_of(config):
    return load_file(folder_of(config).adapter / "adapter_model.safetensors")


def losses_of(config):
    return [(record.step, record.loss) for record in read_progress(folder_of(config))]


def checkpoints_of(config):
    """Checkpoint folders, oldest first; a file beside them is Ray's own list of them."""
    return sorted(path for path in folder_of(config).root.glob("checkpoint_*") if path.is_dir())


def steps_of(checkpoint):
    return json.loads((checkpoint / "manifest-0.json").read_text())["step"]


def newest_checkpoint(config):
    return checkpoints_of(config)[-1]


def test_adapter_folder_explains_itself_and_opens_in_peft(quantised):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config, _ = quantised
    folder = folder_of(config).adapter
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "config.yaml", "finlora.yaml"}
    contract = read_contract(folder)
    assert (contract.variant, contract.template, contract.num_train_examples) == (
        "4bit-r4",
        "raw",
        len(load_training_set(config).encoded),
    )
    assert contract.data_hashes == load_training_set(config).hashes
    assert contract.metrics == {"loss_last": losses_of(config)[-1][1], "steps": 6.0}
    assert load_config(folder / "config.yaml") == config
    net = AutoModelForCausalLM.from_pretrained(config.model.base, dtype=torch.float32)
    ids = torch.arange(20)[None] + 5
    with torch.inference_mode():
        before = net(ids).logits
        assert not torch.equal(PeftModel.from_pretrained(net, str(folder)).eval()(ids).logits, before)


def test_result_row_tells_what_the_run_brought(quantised):
    config, result = quantised
    (row,) = read_results(folder_of(config).results)
    assert dataclasses.replace(row, created="") == dataclasses.replace(result, created="")
    assert (row.kind, row.task, row.variant, row.bits) == ("training", "synthetic_sentiment", "4bit-r4", 4)
    assert row.loss_curve == [[float(step), loss] for step, loss in losses_of(config)]
    assert [step for step, _ in row.loss_curve] == [1, 2, 3, 4, 5, 6]
    assert row.metrics == {"loss_first": row.loss_curve[0][1], "loss_last": row.loss_curve[-1][1]}
    assert row.metrics["loss_last"] < row.metrics["loss_first"]
    assert row.adapter_mib == (folder_of(config).adapter / "adapter_model.safetensors").stat().st_size / 2**20
    assert row.gpu_hours is None
    assert row.is_partial is True
    assert 0.1 < row.peak_memory_gib < 32
    assert row.tokens_per_second > 0
    assert row.config == config_to_tree(config)
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


def test_progress_reaches_tensorboard(quantised):
    assert [path.name for path in (folder_of(quantised[0]).root / "tensorboard").iterdir()] != []


def test_two_workers_equal_a_plain_adamw_loop(uninterrupted):
    """Against PEFT on transformers' own model with torch's AdamW, one process, whole padded batches, float32.

    The gradients agree to rounding (1e-6 relative); Adam divides by their root, so parameters agree to 1e-4 after six
    steps. The exported bf16 weights then differ by one rounding at most (2**-8 relative).
    """
    from finlora.model.base import load_base
    from finlora.model.lora import attach_lora, trainable_parameters
    from finlora.train.optimizer import learning_rate_at
    from finlora.train.sampler import Sampler

    config, _ = uninterrupted
    net = load_base(ModelConfig(base=config.model.base, compute_dtype="float32"), 16, torch.device("cpu"), 0).model
    model = attach_lora(net, LoraConfig(dropout=0.0), net.name_or_path, config.seed).train()
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01, weight_decay=0.1)
    encoded = load_training_set(config).encoded
    sampler = Sampler(num_examples=11, global_batch_size=4, micro_batch_size=4, world_size=1, seed=config.seed)
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


def act_once(at_step, marker, act):
    """Return a worker's body in which worker 0 calls `act` once, after it has recorded `at_step`."""

    def work(loop_config):  # a closure, so Ray sends it by value and workers need no test module
        from finlora.train import recorder
        from finlora.train import worker as there

        append = recorder.append_progress

        def append_and_act(folder, progress):
            append(folder, progress)
            if progress.step == at_step and not os.path.exists(marker):  # noqa: PTH110 - a plain path travels by value
                open(marker, "w").close()  # noqa: PTH123
                act()

        recorder.append_progress = append_and_act
        return there._work(loop_config)

    return work


def test_killed_worker_resumes_with_the_uninterrupted_numbers(uninterrupted, configure, monkeypatch, tmp_path):
    """Worker 0 kills itself after step 5, once; the last checkpoint is from step 4 or, not yet registered, before."""
    from finlora.train import worker

    marker = str(tmp_path / "was-killed")
    monkeypatch.setattr(worker, "_work", act_once(5, marker, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    config = configure("name=killed", *EXACT)
    result = worker.run_training(config)
    assert Path(marker).exists()
    lines = [json.loads(line)["step"] for line in folder_of(config).progress.read_text().splitlines()]
    # Whether the checkpoint of step 4 was registered when the worker died is a race; that of step 2 was.
    assert lines[:5] == [1, 2, 3, 4, 5]
    assert 3 <= lines[5] <= 5
    assert lines[5:] == list(range(lines[5], 7))
    whole, _ = uninterrupted
    assert losses_of(config) == losses_of(whole)
    assert result.loss_curve == [[float(step), loss] for step, loss in losses_of(whole)]
    expected = weights_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(config).items())


def test_zero_one_adam_stops_and_resumes_where_workers_agree(configure, ray_instance, monkeypatch, tmp_path):
    """Interrupted at step 14, between two exchanges; resumed, then killed at step 17, again between two.

    18 steps: exact exchanges at 1 to 10, then 1-bit ones at 11, 12, 13, 15 and, as the last step always does, 18.
    """
    from finlora.train import worker

    settings = [
        *EXACT,
        "optim.name=zero_one_adam",
        "optim.max_local_steps=4",
        "train.epochs=6",
        "train.keep_checkpoints=20",
    ]
    whole, config = configure("name=zero-one-whole", *settings), configure("name=zero-one", *settings)
    expected = worker.run_training(whole)
    # Due at each second step and at the ends of epochs of 3 steps; those of 14 and 16 wait for 15 and 18.
    assert [steps_of(path) for path in checkpoints_of(whole)] == [2, 3, 4, 6, 8, 9, 10, 12, 15, 18]
    assert [wire["rounds"] for wire in expected.wire] == [15, 15]
    num_elements = sum(
        tensor.numel() for tensor in load_file(newest_checkpoint(whole) / "adapter.safetensors").values()
    )
    assert [wire["bytes_adam"] for wire in expected.wire] == [18 * 4 * num_elements] * 2
    assert expected.wire[0]["bytes_sent"] == expected.wire[1]["bytes_sent"] > 0

    driver = os.getpid()
    interrupt = lambda: (os.kill(driver, signal.SIGINT), time.sleep(1))  # noqa: E731
    monkeypatch.setattr(worker, "_work", act_once(14, str(tmp_path / "was-interrupted"), interrupt))
    lines = []
    with pytest.raises(StoppedError, match=r"^Stopped by SIGINT at step 15 of 18, which is saved") as stopped:
        worker.run_training(config, lines.append)
    assert stopped.value.exit_code == 130
    assert [line.partition(":")[0] for line in lines] == ["SIGINT"]
    assert steps_of(newest_checkpoint(config)) == 15
    assert not folder_of(config).adapter.exists()

    monkeypatch.setattr(
        worker, "_work", act_once(17, str(tmp_path / "was-killed"), lambda: os.kill(os.getpid(), signal.SIGKILL))
    )
    result = worker.run_training(config)
    steps = [json.loads(line)["step"] for line in folder_of(config).progress.read_text().splitlines()]
    assert steps == [*range(1, 16), 16, 17, 16, 17, 18]
    assert result.loss_curve == expected.loss_curve
    assert all(torch.equal(tensor, weights_of(whole)[name]) for name, tensor in weights_of(config).items())
    for ours, theirs in zip(result.wire, expected.wire, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}


def test_damaged_checkpoint_is_refused_and_the_one_before_goes_on(quantised, monkeypatch, tmp_path):
    """An error of a worker comes back as it was raised there, without a second start; then its advice is followed."""
    from finlora.train import worker

    starts = str(tmp_path / "starts")

    def work(loop_config):
        from finlora.train import worker as there

        with open(starts, "a") as stream:  # noqa: PTH123
            stream.write("x")
        return there._work(loop_config)

    config, result = quantised
    newest = newest_checkpoint(config)
    path = newest / "optimizer-1.pt"
    path.write_bytes(path.read_bytes()[:-1])
    words = r"is damaged: optimizer-1.pt is missing or differs from .* Delete that folder to go on from the one before"
    retrying = dataclasses.replace(config, train=dataclasses.replace(config.train, max_failures=3))
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_work", work)
        with pytest.raises(CheckpointError, match=words):
            worker.run_training(retrying)
    assert Path(starts).read_text() == "xx"
    shutil.rmtree(newest)
    lines = []
    again = worker.run_training(config, lines.append)
    assert [line.rpartition("/")[2] for line in lines][-1].startswith("checkpoint_")
    assert lines[0] == f"{newest} is gone."
    assert again.loss_curve == result.loss_curve


def test_gpu_that_the_cluster_lacks_is_refused_by_words(configure, ray_instance):
    from finlora.train.worker import run_training

    config = configure("name=on-gpu", "train.device=cuda", "train.gpus_per_worker=1")
    with pytest.raises(
        ResourceError, match=r"asks for 2 GPU \(2 workers x 1\), but the cluster has 0 .*train.device=cpu"
    ):
        run_training(config)
    assert not folder_of(config).root.exists()
