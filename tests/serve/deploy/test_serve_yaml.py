"""Shipped Serve YAMLs: valid, as their names say, and within the memory that they claim."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
import ray
import yaml
from typer.testing import CliRunner

from finlora.cli.main import app
from finlora.configfile import is_server_file, load_config
from finlora.errors import ConfigError, ResourceError
from finlora.formula.llama import LLAMA_8B, LLAMA_70B
from finlora.model.memory.fixed_memory import GIB, count_weight_bytes
from finlora.serve.deploy.serve_yaml import (
    check_server,
    count_stages,
    read_deployment,
    require_capacity,
    require_no_service,
)
from finlora.serve.settings import make_absolute, read_settings, to_args

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "serve_configs").glob("*.yaml"))
SHIPPED = {
    "cpu-demo": (2, 4, 1),
    "own-table-cpu": (1, 4, 1),
    "llama-8b-8bit": (1, 8, 1),
    "llama-8b-replicated": (1, 8, 4),
    "llama-70b-4bit-pipeline": (4, 4, 1),
    "llama-70b-8bit-pipeline": (4, 8, 1),
}


def test_every_listed_yaml_ships():
    assert {file.stem for file in FILES} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_settings_match_the_name_of_the_yaml(name):
    path = ROOT / "serve_configs" / f"{name}.yaml"
    deployment = read_deployment(path)
    settings = deployment.settings
    found = (settings.stages.num, settings.bits, deployment.options["num_replicas"])
    assert found == SHIPPED[name]
    assert deployment.http["host"] == "127.0.0.1", "access from other machines must be opted in"
    assert deployment.logging == {"enable_access_log": False}, "the server logs each request itself, with the key's id"
    assert settings.keys_file
    assert settings.audit_dir
    assert deployment.http["request_timeout_s"] > settings.limits.deadline_s, (
        "the deadline must come first, with its own message"
    )
    assert path.read_text().startswith("# ")
    assert f"serve_configs/{name}.yaml" in path.read_text()


@pytest.mark.parametrize("name", [name for name in SHIPPED if name.startswith("llama")])
def test_gpu_has_the_memory(name):
    """Weights by forecast, a KV cache of bfloat16 and 3 GiB for the rest fit a card of 48 GB (44.5 GiB usable)."""
    settings = read_deployment(ROOT / "serve_configs" / f"{name}.yaml").settings
    shape = LLAMA_70B if "70b" in name else LLAMA_8B
    row = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 2
    cache = settings.stages.cache_rows * row / settings.stages.num / GIB
    weights = count_weight_bytes(shape, settings.bits) / settings.stages.num / GIB
    assert weights + cache + 3 < 44.5
    (claimed,) = re.findall(
        r"([\d.]+) GiB for the [\d,]+ below", (ROOT / "serve_configs" / f"{name}.yaml").read_text()
    ) or ["24"]
    assert float(claimed) == pytest.approx(cache, rel=0.02)


def test_overrides_change_settings_and_all_faults_are_reported():
    path = ROOT / "serve_configs" / "cpu-demo.yaml"
    settings = read_deployment(path, ["stages.num=4", "model.bits=16"]).settings
    assert (settings.stages.num, settings.bits) == (4, 16)
    with pytest.raises(ConfigError, match=r"(?s)2 settings are wrong.*model.bits=3.*stages.nmu is not a setting"):
        read_deployment(path, ["stages.nmu=4", "model.bits=3"])


def test_settings_reach_a_replica_unchanged(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    settings = read_settings({"model": {"base": "base"}, "adapters_dir": "a", "keys_file": "~/k"})
    absolute = make_absolute(settings)
    assert read_settings(to_args(absolute)) == absolute
    assert (absolute.model.base, absolute.adapters_dir) == (str(tmp_path / "base"), str(tmp_path / "a"))
    assert absolute.keys_file == str(Path("~/k").expanduser())
    assert make_absolute(read_settings({})).model.base == settings.model.base.replace(
        "base", read_settings({}).model.base
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tree: tree.update(http_options={"prot": 1, "port": "x"}), r"http_options.port"),
        (
            lambda tree: tree["applications"][0].update(import_path="other:app"),
            r"these import paths: other:app\. Expected one",
        ),
        (lambda tree: tree.update(applications=[]), r"import paths: none\."),
        (lambda tree: tree["applications"][0].pop("import_path"), r"import_path: Field required"),
        (lambda tree: tree["applications"][0]["args"].update(name="a:b"), r"without colon"),
    ],
)
def test_invalid_yaml_is_refused_with_a_message(tmp_path, change, words):
    tree = yaml.safe_load((ROOT / "serve_configs" / "cpu-demo.yaml").read_text())
    change(tree)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=words):
        read_deployment(tmp_path / "x.yaml")


def test_missing_or_malformed_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent.yaml does not exist: see serve_configs/"):
        read_deployment(tmp_path / "absent.yaml")
    (tmp_path / "x.yaml").write_text("[")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        read_deployment(tmp_path / "x.yaml")


def test_dry_run_prints_the_plan_and_key_is_shown_once(tmp_path):
    run = CliRunner().invoke
    plan = run(app, ["serve", "--config", str(ROOT / "serve_configs" / "llama-70b-4bit-pipeline.yaml"), "--dry-run"])
    assert "at 4 bit in 4 stages on cuda, 1 copies, 262,144 tokens of cache" in plan.output
    made = run(app, ["key", "desk", "--file", str(tmp_path / "k.yaml"), "--adapters", "a, b", "--requests", "5"])
    assert made.output.startswith("finlora-desk-")
    (entry,) = yaml.safe_load((tmp_path / "k.yaml").read_text())
    assert (entry["adapters"], entry["requests_per_minute"], entry["is_admin"]) == (["a", "b"], 5, False)


def test_yamls_of_runs_and_servers_are_distinguished():
    with pytest.raises(ConfigError, match=r"demo-4bit-r4.yaml describes no served model: expected a Serve YAML"):
        read_deployment(ROOT / "jobs" / "configs" / "demo-4bit-r4.yaml")
    with pytest.raises(
        ConfigError, match=r"cpu-demo.yaml describes a served model: expected a run's.*`finlora serve --config"
    ):
        load_config(ROOT / "serve_configs" / "cpu-demo.yaml")


@pytest.mark.parametrize(
    "text", ["applications: []\n", '"applications": []\n', "{applications: []}\n", "name: x\napplications:\n"]
)
def test_every_reader_recognises_a_servers_yaml(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    assert is_server_file(path)
    with pytest.raises(ConfigError, match="describes a served model"):
        load_config(path)
    result = CliRunner().invoke(app, ["doctor", "--config", str(path)])
    assert isinstance(result.exception, ConfigError)
    assert "describes a served model" not in str(result.exception)


def test_too_small_cluster_is_refused_before_stages_start():
    deployment = read_deployment(ROOT / "serve_configs" / "llama-8b-replicated.yaml")
    assert count_stages(deployment) == 4
    require_capacity(deployment, {"GPU": 4.0, "CPU": 64.0})
    with pytest.raises(
        ResourceError, match=r"asks for 4 GPU \(4 stages of all copies x 1\), and the cluster has 2: choose fewer"
    ):
        require_capacity(deployment, {"GPU": 2.0, "CPU": 64.0})
    with pytest.raises(ResourceError, match=r"asks for 4 CPU .* or a lower stages.cpus"):
        require_capacity(deployment, {"GPU": 4.0, "CPU": 2.0})


def test_adapters_dir_that_is_a_file_is_refused(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("FINLORA_API_KEY", "k" * 43)
    (tmp_path / "adapters").write_text("")
    changes = [f"model.base={tiny_base}", f"adapters_dir={tmp_path / 'adapters'}", "keys_file=null", "audit_dir=null"]
    deployment = read_deployment(ROOT / "serve_configs" / "cpu-demo.yaml", changes)
    with pytest.raises(ConfigError, match=r"adapters is a file: expected the folder of adapters"):
        check_server(deployment, None, None, is_here=False)


def test_taken_port_is_refused_before_ray_starts(tiny_base, monkeypatch):
    monkeypatch.setenv("FINLORA_API_KEY", "k" * 43)
    changes = [f"model.base={tiny_base}", "adapters_dir=null", "keys_file=null", "audit_dir=null"]
    deployment = read_deployment(ROOT / "serve_configs" / "cpu-demo.yaml", changes)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(
            ResourceError, match=rf"^port={port} at 127.0.0.1 cannot be opened .*use another port with --p"
        ):
            check_server(deployment, None, port, is_here=True)
        assert check_server(deployment, None, port, is_here=False).http["port"] == port


def test_cluster_with_a_running_service_is_refused(monkeypatch):
    """`finlora serve` would shut that service down when it ends."""

    def find(name, namespace):
        raise ValueError("no such actor")

    monkeypatch.setattr(ray, "get_actor", find)
    require_no_service()
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: (name, namespace))
    with pytest.raises(
        ResourceError, match=r"a Ray Serve service runs on this cluster already: update it with `serve deploy"
    ):
        require_no_service()
