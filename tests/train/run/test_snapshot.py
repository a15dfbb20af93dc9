"""Repaired list of checkpoints: Ray Train itself must read back the checkpoints in the folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from ray.train.v2._internal.exceptions import CheckpointManagerInitializationError

from finlora.durable import seal, unseal
from finlora.optim.traffic import Wire
from finlora.train.run.checkpoint import CheckpointInfo, save_checkpoint
from finlora.train.run.snapshot import SNAPSHOT, repair_snapshot

# Ray Train writes its list by a call that pydantic has deprecated.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The `json` method:DeprecationWarning", "ignore:The `parse_obj`:DeprecationWarning"
)


def write(root, step, workers=(0, 1)):
    """Write the checkpoint of a step by these of two workers."""
    parameters = {"a.lora_A": torch.nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for worker in workers:
        info = CheckpointInfo(step=step, world_size=2, run_hash="abc")
        save_checkpoint(root / name(step), worker, info, parameters, optimizer.state_dict(), Wire())
    return name(step)


def name(step):
    return f"checkpoint_2026-01-01_00-00-{step:02}.000000"


def manager(root):
    """Ray Train's own reader of the list."""
    from ray.train import CheckpointConfig
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import StorageContext

    storage = StorageContext(storage_path=str(root.parent), experiment_dir_name=root.name)
    return CheckpointManager(checkpoint_config=CheckpointConfig(num_to_keep=2), storage_context=storage)


def listed(root):
    """Return what Ray Train would resume from and the list it holds, by folder name."""
    read = manager(root)
    newest = read.latest_checkpoint_result
    return (newest and newest.checkpoint.path.rpartition("/")[2]), [
        result.checkpoint.path.rpartition("/")[2] for result in read._checkpoint_results
    ]


@pytest.fixture
def root(tmp_path):
    """A run with the checkpoints of steps 2 and 4, as Ray Train lists them."""
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.training_report import _TrainingReport

    folder = tmp_path / "run"
    folder.mkdir()
    writer = manager(folder)
    writer._notify = lambda: None  # there is no event loop to notify
    for step in (2, 4):
        path = folder / write(folder, step)
        checkpoint = Checkpoint(path=str(path), filesystem=writer._storage_context.storage_filesystem)
        writer.register_checkpoint(
            _TrainingReport(checkpoint=checkpoint, metrics={"step": step, "wire": [{"rounds": 1}]}, validation=False)
        )
    return folder


def test_right_list_is_left_as_it_is(root):
    before = (root / SNAPSHOT).read_bytes()
    assert repair_snapshot(root) == []
    assert (root / SNAPSHOT).read_bytes() == before
    assert listed(root) == (name(4), [name(2), name(4)])


def test_fresh_folder_needs_nothing(tmp_path):
    assert repair_snapshot(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_run_goes_on_from_the_one_before_a_deleted_checkpoint(root):
    shutil.rmtree(root / name(4))
    with pytest.raises(CheckpointManagerInitializationError, match="does not exist anymore"):
        listed(root)
    assert repair_snapshot(root) == [f"{root / name(4)} is missing.", f"The run resumes from {root / name(2)}."]
    assert listed(root) == (name(2), [name(2)])
    assert json.loads((root / SNAPSHOT).read_text())["checkpoint_results"][0]["metrics"]["step"] == 2
    assert repair_snapshot(root) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"checkpoint_results": 3}'])
def test_truncated_list_is_written_again(root, text):
    (root / SNAPSHOT).write_text(text)
    with pytest.raises(CheckpointManagerInitializationError):
        listed(root)
    assert repair_snapshot(root) == [
        f"{root / SNAPSHOT} was truncated: listed the checkpoints again.",
        f"The run resumes from {root / name(4)}.",
    ]
    assert listed(root) == (name(4), [name(2), name(4)])


def test_whole_checkpoint_that_was_not_listed_yet_counts(root):
    write(root, 6)
    assert repair_snapshot(root) == [f"The run resumes from {root / name(6)}."]
    assert listed(root) == (name(6), [name(2), name(4), name(6)])


@pytest.mark.parametrize("damage", ["no manifest", "cut file"])
def test_checkpoint_that_was_not_written_to_its_end_is_removed(root, damage):
    folder = root / write(root, 6, workers=(0,) if damage == "no manifest" else (0, 1))
    if damage == "cut file":
        (folder / "optimizer-1.pt").write_bytes(b"x")
    assert repair_snapshot(root) == [f"Removed {folder}: it was incomplete."]
    assert not folder.exists()
    assert listed(root) == (name(4), [name(2), name(4)])


def test_run_without_any_checkpoint_left_starts_from_its_first_step(root):
    for step in (2, 4):
        shutil.rmtree(root / name(step))
    assert repair_snapshot(root)[-1] == "No checkpoint is left: the run starts from its first step."
    assert listed(root) == (None, [])


def test_checkpoint_of_other_data_is_not_thrown_away_with_a_broken_list(root):
    """It stays in the list, so that the workers refuse it with a message."""
    (root / SNAPSHOT).write_text("")
    for path in root.glob("checkpoint_*/manifest-*.json"):
        path.write_text(json.dumps(seal({**unseal(json.loads(path.read_text())), "run_hash": "xyz"})))
    repair_snapshot(root)
    assert listed(root) == (name(4), [name(2), name(4)])


def test_clock_that_was_set_back_does_not_turn_the_order_round(root):
    """Names are times: the checkpoint of step 6 was written an hour earlier by the clock, and the list was lost."""
    late = "checkpoint_2025-12-31_23-00-00.000000"
    (root / write(root, 6)).replace(root / late)
    (root / SNAPSHOT).write_text("")
    assert repair_snapshot(root)[-1] == f"The run resumes from {root / late}."
    assert listed(root) == (late, [name(2), name(4), late])
