"""A training and its evaluation by two stages as a user types them, with workers that start and import by themselves.

All other trainings of the tests fork their workers from a process that has imported everything (tests/fixtures/warm_workers.py).
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from finlora.results import read_results

pytestmark = pytest.mark.ray
VERBS = """
import sys
from finlora.cli.main import main
config = sys.argv[1]
for words in (["train", "--config", config, "train.num_workers=2"], ["evaluate", "--config", config, "eval.num_stages=2"]):
    try:
        main(words)
    except SystemExit as stop:
        if stop.code:
            raise
"""


def test_training_and_evaluation_run_with_workers_that_start_as_usual(make_config, tmp_path):
    from finlora.configfile import save_config

    config = make_config(
        *("name=own", "train.cpus_per_worker=0.5", "train.max_steps=2", "train.global_batch_size=4"),
        *("data.max_train_examples=8", "data.max_test_examples=4", "eval.num_gpus=1"),
    )
    save_config(config, tmp_path / "own.yaml")
    with tempfile.TemporaryDirectory(prefix="fl-") as folder:  # short, for Ray's sockets
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        own = {"RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        environment |= own | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-c", VERBS, str(tmp_path / "own.yaml")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    training, evaluation = read_results(tmp_path / "runs" / "own" / "results.jsonl")
    assert (training.kind, [step for step, _ in training.loss_curve][-1]) == ("training", 2)
    assert (evaluation.kind, evaluation.num_examples, evaluation.run) == ("evaluation", 4, "own")
    assert "2 stages busy" in done.stdout + done.stderr
