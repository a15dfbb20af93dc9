"""Real runs under Ray Train and DeepSpeed that several test modules share: two CPU workers on the tiny base.

Each fit takes about 15 s, nearly all of it the start of two worker processes; so runs are made once a session.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_run import add_evaluation, add_training, make_run
from runs import EXACT

from finlora.configfile import load_config


@pytest.fixture(scope="session")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
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


@pytest.fixture(scope="session")
def quantised(configure, ray_instance):
    """A 4-bit run in bf16 of six steps that keeps two of its checkpoints; each second batch leaves a worker nothing."""
    from finlora.train.worker import run_training

    config = configure(
        "name=four-bit",
        "model.bits=4",
        *("model.compute_dtype=bfloat16", "train.precision=bf16"),  # whatever this processor multiplies faster
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


@pytest.fixture(scope="session")
def uninterrupted(configure, ray_instance):
    from finlora.train.worker import run_training

    config = configure("name=whole", *EXACT)
    return config, run_training(config)


@pytest.fixture(scope="session")
def offline_export(tmp_path_factory):
    """A made run, exported to a new SQLite file of MLflow in a process tree that can open no internet socket.

    Returns:
        Its folder, the ended process, and the file, with MLflow's tables; making them takes seconds, so tests copy it.
    """
    pytest.importorskip("mlflow", reason="needs the extra mlflow")
    return export_without_network("mlflow", tmp_path_factory.mktemp("mlflow"))


def export_without_network(system, root):
    folder = make_run(root / "runs")
    add_training(folder)
    add_evaluation(folder)
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "tracking" / "without_network.py", "export", system, folder.root],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin", "HOME": str(root / "home"), "PYTHONPATH": ":".join(sys.path)},
    )
    return folder, done, root / "runs" / "mlflow.db"
