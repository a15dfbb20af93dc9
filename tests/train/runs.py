"""Settings of real runs in tests, and readers of their folders."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file

from finlora.train.run.progress import read_progress
from finlora.train.run.run_folder import RunFolder

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


def folder_of(config):
    return RunFolder(Path(config.output_dir) / config.name)


def weights_of(config):
    return load_file(folder_of(config).adapter / "adapter_model.safetensors")


def losses_of(config):
    return [(record.step, record.loss) for record in read_progress(folder_of(config))]


def checkpoints_of(config):
    """Return checkpoint folders, oldest first, without Ray's list file."""
    return sorted(path for path in folder_of(config).root.glob("checkpoint_*") if path.is_dir())


def steps_of(checkpoint):
    return json.loads((checkpoint / "manifest-0.json").read_text())["step"]


def newest_checkpoint(config):
    return checkpoints_of(config)[-1]
