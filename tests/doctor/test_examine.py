"""`finlora doctor` as a user types it: without a GPU, without a cluster, and against one."""

from __future__ import annotations

import json
import threading

import pytest

from finlora.cli.main import main
from finlora.config import RunConfig
from finlora.configfile import save_config
from finlora.doctor import examine
from finlora.doctor.examine import count_wanted, require_inputs, start_inputs
from finlora.errors import ConfigError, DatasetError, ModelError
from finlora.model import base_files


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; returns exit code and standard output."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["doctor", *map(str, arguments)])
        return stop.value.code, capsys.readouterr().out

    return run


def test_good_config_has_no_fault(call, make_config, tmp_path):
    save_config(make_config(), tmp_path / "c.yaml")
    code, out = call("--config", tmp_path / "c.yaml")
    assert code == 0
    assert "ok      Ray: RAY_ADDRESS is not set: each command starts its own Ray on this machine" in out
    assert "rows, each with a label token" in out
    assert ", 0 faults.\n" in out
    assert not (tmp_path / "runs").exists()


def test_json_holds_the_findings_and_the_code(call, make_config, tmp_path):
    save_config(make_config(f"data.dir={tmp_path / 'none'}"), tmp_path / "c.yaml")
    code, out = call("--config", tmp_path / "c.yaml", "--json")
    values = json.loads(out)
    assert (code, values["exit_code"]) == (3, 3)
    faults = [finding for finding in values["findings"] if finding["level"] == "fault"]
    assert [finding["check"] for finding in faults] == ["synthetic_sentiment train", "synthetic_sentiment test"]


def test_address_without_a_cluster_is_a_fault_among_the_others(call, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    code, out = call()
    assert code == 5
    assert "fault   Ray: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1 (Connection refused)" in out
    assert "versions:" in out


def test_serve_yaml_is_looked_at_as_the_server_would(call, tiny_base, tmp_path, monkeypatch):
    text = (
        "applications:\n  - name: a\n    import_path: finlora.serve.deploy.replica:build\n    args:\n"
        f"      model: {{base: {tiny_base}}}\n      keys_file: {tmp_path / 'keys.yaml'}\n      stages: {{device: cpu}}\n"
    )
    (tmp_path / "s.yaml").write_text(text)
    monkeypatch.setenv("FINLORA_API_KEY", "")
    code, out = call("--config", tmp_path / "s.yaml")
    assert code == 2
    assert f"fault   server: the key file {tmp_path / 'keys.yaml'}" in out


def test_inputs_of_a_run_are_required_before_it_starts(make_config, tmp_path):
    require_inputs(make_config(), splits=("train", "test"))
    with pytest.raises(DatasetError, match=r"train.parquet: not found. Run `finlora prepare synthetic_sentiment"):
        require_inputs(make_config(f"data.dir={tmp_path}"), splits=("train",))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"output_dir=.*file/x: .* is not a folder\): give another folder"):
        require_inputs(make_config(f"output_dir={tmp_path / 'file' / 'x'}"), splits=("train",))


def test_gpus_are_those_of_training_or_evaluation():
    assert count_wanted(RunConfig()) == 1.0


@pytest.mark.ray
def test_each_node_of_a_cluster_is_looked_at(ray_instance, make_config, tmp_path):
    import socket

    from finlora.doctor.nodes import gather_nodes

    nodes, faults = gather_nodes([str(tmp_path)], [str(tmp_path / "absent")])
    assert faults == []
    (node,) = nodes
    assert (node.host, node.ray_gpus) == (socket.gethostname(), 0.0)
    assert abs(node.skew_s) < 5
    assert list(node.missing) == [str(tmp_path / "absent")]
    assert {disk.path for disk in node.disks} >= {str(tmp_path)}


def test_inputs_are_refused_at_once_or_by_the_future(make_config, prepared_synthetic, tmp_path, monkeypatch):
    with pytest.raises(ModelError, match="is neither a folder here nor a hub id"):
        start_inputs(make_config("model.base=nothing/of/it"), splits=("train",))
    with pytest.raises(DatasetError):
        start_inputs(make_config(f"data.dir={tmp_path}"), splits=("train",))
    waits, folder = threading.Event(), tmp_path / "empty"
    folder.mkdir()
    read = base_files.read_base_files

    def read_late(model):
        waits.wait(20)
        return read(model)

    monkeypatch.setattr(base_files, "read_base_files", read_late)
    monkeypatch.setattr(examine, "_AT_ONCE_S", 0.01)
    late = start_inputs(make_config(f"model.base={folder}"), splits=("train",))
    good = start_inputs(make_config(), splits=("train",))
    assert not late.done()
    waits.set()
    with pytest.raises(ModelError, match=r"has no config.json"):
        late.result(60)
    assert good.result(60).tokenizer is not None
