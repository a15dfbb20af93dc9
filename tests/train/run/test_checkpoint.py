"""Checkpoints: an exact round trip, and the refusal of incomplete ones and of other runs' ones."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch

from finlora.durable import seal, unseal
from finlora.errors import CheckpointError, FinloraError
from finlora.optim.traffic import Wire
from finlora.train.run.checkpoint import (
    CheckpointInfo,
    CheckpointSchedule,
    load_checkpoint,
    read_info,
    require_finite,
    save_checkpoint,
)

INFO = CheckpointInfo(step=7, world_size=2, run_hash="abc")


def make(seed, steps=3):
    """A small model with an optimiser that has a state."""
    torch.manual_seed(seed)
    parameters = {name: torch.nn.Parameter(torch.randn(4, 3)) for name in ("a.lora_A", "a.lora_B")}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        train(parameters, optimizer)
    return parameters, optimizer


def train(parameters, optimizer):
    optimizer.zero_grad()
    sum((parameter**3).sum() for parameter in parameters.values()).backward()
    optimizer.step()


@pytest.fixture
def saved(tmp_path):
    """A checkpoint of two workers."""
    for worker in range(2):
        parameters, optimizer = make(seed=1)
        wire = Wire(rounds=3, bytes_sent=10 + worker, bytes_adam=20, seconds=0.5)
        save_checkpoint(tmp_path / "c", worker, INFO, parameters, optimizer.state_dict(), wire)
    return tmp_path / "c"


def test_training_goes_on_exactly_where_it_was_saved(saved):
    parameters, optimizer = make(seed=1)
    others, other_optimizer = make(seed=2, steps=1)
    assert read_info(saved, "abc", 2) == INFO
    assert load_checkpoint(saved, 1, others, other_optimizer) == Wire(
        rounds=3, bytes_sent=11, bytes_adam=20, seconds=0.5
    )
    for _ in range(3):
        train(parameters, optimizer)
        train(others, other_optimizer)
    for name in parameters:
        assert torch.equal(parameters[name], others[name])
    for name in parameters:
        state, other = optimizer.state[parameters[name]], other_optimizer.state[others[name]]
        assert all(torch.equal(state[key], other[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_folder_holds_adapter_once_and_a_state_a_worker(saved):
    assert sorted(path.name for path in saved.iterdir()) == [
        "adapter.safetensors",
        "manifest-0.json",
        "manifest-1.json",
        "optimizer-0.pt",
        "optimizer-1.pt",
    ]


@pytest.mark.parametrize("name", ["manifest-0.json", "manifest-1.json"])
def test_missing_manifest_is_refused_with_a_message(saved, name):
    (saved / name).unlink()
    with pytest.raises(
        CheckpointError, match=rf"is incomplete: {name} cannot be read \(FileNotFoundError: .*\). Delete that"
    ):
        read_info(saved, "abc", 2)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": 1, "world_size": 2, "run_hash": "abc", "files": 3}'])
def test_broken_manifest_is_refused_with_a_message(saved, content):
    (saved / "manifest-1.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"is incomplete: manifest-1.json cannot be read"):
        read_info(saved, "abc", 2)


@pytest.mark.parametrize("name", ["step", "world_size", "run_hash", "wire", "files"])
def test_manifest_whose_bits_have_changed_is_refused(saved, name):
    """With a changed digit the run would resume at another step, with the optimiser state of this one."""
    path = saved / "manifest-1.json"
    manifest = json.loads(path.read_text())
    manifest[name] = {"step": 5, "world_size": 3, "run_hash": "abd", "wire": {"rounds": 9}, "files": {}}[name]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"manifest-1.json cannot be read \(ValueError: it was changed after"):
        read_info(saved, "abc", 2)
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"it has no sha256 of its own"):
        read_info(saved, "abc", 2)


def test_parts_of_two_steps_are_no_checkpoint(saved):
    path = saved / "manifest-1.json"
    manifest = unseal(json.loads(path.read_text()))
    path.write_text(json.dumps(seal({**manifest, "step": 9})))
    with pytest.raises(CheckpointError, match=r"is of steps \[\d, 9\] at once: expected one step of all workers"):
        read_info(saved, "abc", 2)


def test_nan_and_infinity_are_kept_out_of_checkpoints():
    parameters, _ = make(seed=1)
    require_finite(parameters, 3)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            parameters["a.lora_B"].view(-1)[2] = value
        with pytest.raises(
            FinloraError, match=r"1 adapter tensors hold NaN or infinity after step 3, such as a.lora_B"
        ):
            require_finite(parameters, 3)


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer-0.pt", "optimizer-1.pt"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped"])
def test_damaged_part_is_refused_by_its_name(saved, name, damage):
    content = bytearray((saved / name).read_bytes())
    if damage == "missing":
        (saved / name).unlink()
    elif damage == "cut":
        (saved / name).write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"is damaged: {name} is missing or differs from its manifest"):
        read_info(saved, "abc", 2)


def test_other_number_of_workers_is_refused_with_a_message(saved):
    with pytest.raises(CheckpointError, match=r"was written by 2 workers, this run has 1: set train.num_workers=2"):
        read_info(saved, "abc", 1)


def test_other_run_is_refused_with_a_message(saved):
    with pytest.raises(
        CheckpointError, match=r"is of a run with other settings or data: restore them, or choose another"
    ):
        read_info(saved, "abd", 2)


def test_other_tensors_are_refused_with_a_message(saved):
    parameters, optimizer = make(seed=1)
    parameters["b.lora_A"] = parameters.pop("a.lora_B")
    with pytest.raises(CheckpointError, match=r"holds other adapter tensors than lora.target_modules asks for"):
        load_checkpoint(saved, 0, parameters, optimizer)


def test_manifest_cannot_name_files_outside_its_folder(saved, tmp_path):
    """A name with a path is looked up beside the manifest, so nothing outside is read."""
    manifest = unseal(json.loads((saved / "manifest-0.json").read_text()))
    (tmp_path / "outside").write_bytes(b"x")
    manifest["files"]["../outside"] = {
        "bytes": 1,
        "sha256": "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
    }
    (saved / "manifest-0.json").write_text(json.dumps(seal(manifest)))
    with pytest.raises(CheckpointError, match=r"is damaged: ../outside is missing"):
        read_info(saved, "abc", 2)


def due_steps(synchronised, every_steps=4, steps_per_epoch=10, total_steps=25):
    schedule = CheckpointSchedule(steps_per_epoch=steps_per_epoch, total_steps=total_steps, every_steps=every_steps)
    return [step for step in range(1, total_steps + 1) if schedule.is_due(step, is_synchronised=step in synchronised)]


def test_checkpoints_come_each_so_many_steps_at_epoch_ends_and_at_the_end():
    assert due_steps(range(30)) == [4, 8, 10, 12, 16, 20, 24, 25]
    assert due_steps(range(30), every_steps=None) == [10, 20, 25]
    assert due_steps(range(30), every_steps=40) == [10, 20, 25]


def test_checkpoint_waits_for_the_next_step_at_which_workers_agree():
    """Due at 4, 8, 10, 12, 16, 20, 24 and 25; two that wait for the same step are one."""
    assert due_steps({1, 2, 3, 6, 14, 15, 16, 23, 25}) == [6, 14, 16, 23, 25]


def test_schedule_of_zero_one_adam_agrees_at_the_last_step():
    """With 0/1 Adam's own schedule: local steps of up to 16, the last step exchanges."""
    from finlora.optim.optimizer import is_synchronised
    from finlora.optim.zero_one_adam import ZeroOneAdam

    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = ZeroOneAdam(
        [parameter],
        lr=0.1,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        total_steps=500,
        freeze_ratio=0.2,
        max_local_steps=16,
    )
    schedule = CheckpointSchedule(steps_per_epoch=30, total_steps=500, every_steps=1)
    agreed, due = [], []
    for step in range(1, 501):
        parameter.grad = torch.ones(8)
        optimizer.step()
        if is_synchronised(optimizer):
            agreed.append(step)
        if schedule.is_due(step, is_synchronised=is_synchronised(optimizer)):
            due.append(step)
    assert due == agreed
    assert due[:20] == list(range(1, 21))
    assert due[-1] == 500
    assert max(later - step for step, later in pairwise(due)) == 16
    assert is_synchronised(torch.optim.SGD([parameter], lr=0.1))
