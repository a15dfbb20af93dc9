"""Each verb resolves its base once a process: config.json, tensors and tokenizer are read once and passed down."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import yaml

from finlora.config import LoraConfig, ModelConfig
from finlora.configfile import config_to_tree
from finlora.errors import StoppedError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def reads(monkeypatch):
    """Counts of what this process reads of a base."""
    import transformers

    from finlora.model import source

    counts = Counter()

    def count(owner, name, what):
        read = getattr(owner, name)

        def counted(*args, **kwargs):
            counts[what] += 1
            return read(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(source, "_read_config", "config.json")
    count(source, "_find_tensors", "headers")
    count(transformers.AutoTokenizer, "from_pretrained", "tokenizer")
    return counts


ONCE = {"config.json": 1, "headers": 1, "tokenizer": 1}


@pytest.fixture
def adapter(tiny_base, tmp_path):
    """Folder of a fresh 16-bit adapter for the tiny base, with the config of its run."""
    import torch

    from finlora.model.base import load_base
    from finlora.model.contract import make_contract, write_contract
    from finlora.model.lora import attach_lora, save_adapter

    base = load_base(ModelConfig(base=str(tiny_base), compute_dtype="float32"), 16, torch.device("cpu"), 0)
    folder, lora = tmp_path / "adapter", LoraConfig()
    size = save_adapter(attach_lora(base.model, lora, str(tiny_base), 0), folder)
    write_contract(folder, make_contract(base, str(tiny_base), lora, "raw", {}, 1, size, {}))
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "Profit rose", "--base"),
        ("ask", "Profit rose", "--adapter", "{adapter}"),
        ("evaluate", "--base", "data.max_test_examples=2"),
        ("evaluate", "--adapter", "{adapter}", "data.max_test_examples=2"),
        ("evaluate", "--base", "--dry-run"),
        ("train", "--dry-run"),
        ("plan",),
        ("plan", "train.packing=false"),
        ("tune", "--dry-run"),
        ("doctor",),
        ("merge", "--adapter", "{adapter}", "--output", "{merged}"),
    ],
    ids=" ".join,
)
def test_verb_resolves_its_base_once(call, config_file, adapter, tmp_path, reads, arguments):
    reads.clear()
    words = (word.format(adapter=adapter, merged=tmp_path / "merged") for word in arguments)
    code, _, error = call(*words, "--config", config_file)
    assert code == 0 or arguments[0] == "doctor", error  # which may find this machine at fault
    assert reads == ONCE


def test_driver_of_a_training_resolves_its_base_once(call, config_file, reads, monkeypatch):
    from finlora.cluster import connect
    from finlora.train import worker

    def stop(*_arguments):
        raise StoppedError("here workers would start")

    for name in ("prepare", "connect", "require"):
        monkeypatch.setattr(connect, name, lambda *_arguments, **_options: None)
    monkeypatch.setattr(worker, "_make_trainer", lambda *_arguments: None)
    monkeypatch.setattr(worker, "_fit", stop)
    assert "here workers would start" in call("train", "--config", config_file)[2]
    assert reads == ONCE


def test_worker_of_a_trial_resolves_its_base_once(make_config, tmp_path, reads, monkeypatch):
    """Up to its first step: data, plan, weights, held-out examples."""
    import ray.train

    from finlora.train import worker
    from finlora.train.run.run_folder import open_run

    config = make_config("name=worker")
    folder = open_run(config)
    alone = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: alone)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    monkeypatch.setattr(worker, "make_engine", lambda *_arguments: None)
    monkeypatch.setattr(worker, "WireMeter", MagicMock())
    monkeypatch.setattr(worker, "_make_gauges", MagicMock())
    monkeypatch.setattr(worker, "StopRequest", lambda *_arguments: SimpleNamespace(is_asked=lambda: True))
    done, _ = worker._work({"config": config_to_tree(config), "folder": str(folder.root), "holds_out": True})
    assert done == 0
    assert reads == ONCE


@pytest.fixture
def server_file(tiny_base, tmp_path, monkeypatch):
    """The shipped YAML of a server on CPU, for the tiny base."""
    monkeypatch.setenv("FINLORA_API_KEY", "k" * 43)
    tree = yaml.safe_load((ROOT / "serve_configs" / "cpu-demo.yaml").read_text())
    arguments = tree["applications"][0]["args"]
    arguments["model"]["base"] = str(tiny_base)
    for key in ("adapters_dir", "keys_file", "audit_dir"):
        arguments[key] = None
    path = tmp_path / "server.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_doctor_of_a_server_resolves_its_base_once(call, server_file, reads):
    assert "base and tokenizer can be used" in call("doctor", "--config", server_file)[1]
    assert reads == ONCE


def test_replica_resolves_its_base_once_and_its_stages_their_own(server_file, reads, monkeypatch):
    from finlora.pipeline import pipeline
    from finlora.serve.deploy.serve_yaml import read_deployment
    from finlora.serve.served_model import open_pipeline, read_base

    def stop(_device):
        raise StoppedError("here stages would start")

    config = read_deployment(server_file).settings
    base = read_base(config)
    monkeypatch.setattr(pipeline, "wait_with_pauses", stop)
    for _ in range(2):  # again after a crash
        with pytest.raises(StoppedError):
            open_pipeline(config, base)
    assert reads == ONCE


def test_dry_run_of_a_reproduction_looks_at_each_base_once(call, tiny_base, prepared_fpb, tmp_path, reads):
    sizes = (f"--base-8b={tiny_base}", f"--base-70b={tiny_base}")
    code, _, error = call("reproduce", "--output", tmp_path / "out", "--dry-run", *sizes, f"data.dir={prepared_fpb}")
    assert code == 0, error
    assert reads == {"config.json": 1, "headers": 1}
