"""Launcher files, systemd units and image: valid by Ray's and systemd's checks, closed, and with existing files."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted((ROOT / "cluster").glob("on-premise-*.yaml"))
UNITS = sorted((ROOT / "cluster" / "systemd").glob("*.service"))
ENVIRONMENT = (ROOT / "cluster" / "systemd" / "ray.env").read_text()


def start_options(text):
    """Return the options and values of a text's `ray start`."""
    words = shlex.split(text[text.index("ray start") :].partition(";")[0])
    assert words[:2] == ["ray", "start"]
    return {name: value for name, _, value in (word.partition("=") for word in words[2:])}


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_file_is_of_rays_schema(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config({**config, "setup_comands": []}))


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_launcher_starts_with_token_and_loopback_dashboard(path):
    config = yaml.safe_load(path.read_text())
    starts = [line for line in config["head_start_ray_commands"] if "ray start" in line]
    starts += [line for line in config["worker_start_ray_commands"] if "ray start" in line]
    assert len(starts) == (2 if config["provider"]["worker_ips"] else 1)
    for line in starts:
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.config/finlora/cluster-token" in line
        assert "HF_HUB_OFFLINE=1" in line
    options = start_options(starts[0])
    assert options["--dashboard-host"] == "127.0.0.1"
    assert "~/.config/finlora/cluster-token" in config["file_mounts"]


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze")
def test_unit_is_valid_by_systemd(path, tmp_path):
    ours = path.read_text().replace("/opt/finlora/.venv", sys.prefix).replace("/etc/finlora", str(tmp_path))
    (tmp_path / "ray.env").write_text(ENVIRONMENT)
    unit = tmp_path / path.name
    for text, is_valid in ((ours, True), (ours.replace("LimitNOFILE=65536", "LimitNOFLE=65536"), False)):
        unit.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
        own = [line for line in done.stderr.splitlines() if path.stem in line]
        assert (own == []) == is_valid, done.stderr


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_unit_starts_ray_with_options_that_it_has(path):
    from ray.scripts.scripts import start

    known = {name for parameter in start.params for name in parameter.opts}
    (line,) = re.findall(r"^ExecStart=(.+)$", path.read_text(), flags=re.MULTILINE)
    options = start_options(line)
    assert set(options) <= known
    assert "--block" in options
    if "--head" in options:
        assert options["--dashboard-host"] == "127.0.0.1"
    used = set(re.findall(r"\$\{(\w+)\}", line))
    assert used <= set(re.findall(r"^(\w+)=", ENVIRONMENT, flags=re.MULTILINE))


def test_units_demand_the_token_and_no_hub():
    assert {"RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN_PATH=/etc/finlora/ray-token", "HF_HUB_OFFLINE=1"} <= set(
        ENVIRONMENT.splitlines()
    )
    for path in UNITS:
        text = path.read_text()
        assert "EnvironmentFile=/etc/finlora/ray.env" in text
        assert "User=finlora" in text
        assert "NoNewPrivileges=yes" in text


def test_image_copies_what_is_there_and_does_not_run_as_root():
    lines = (ROOT / "cluster" / "Containerfile").read_text().splitlines()
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"Makefile", "pyproject.toml", "requirements", "finlora", "jobs"} <= set(copied)
    assert [name for name in copied if not (ROOT / name).exists()] == []
    users = [line.split()[1] for line in lines if line.startswith("USER")]
    assert users == ["ray"]
    assert lines.index("USER ray") < next(n for n, line in enumerate(lines) if "make setup" in line)
