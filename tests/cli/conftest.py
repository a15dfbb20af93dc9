"""The command line called in this process, on a config of the tiny base."""

from __future__ import annotations

import pytest

from finlora.cli.main import main
from finlora.configfile import save_config


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command line in this process; returns exit code, standard output and standard error."""
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "0")  # main sets them where they are not: afterwards they are as before

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return stop.value.code, output.out, output.err

    return run


@pytest.fixture
def config_file(make_config, tmp_path):
    """A YAML file on the tiny base and the generated set."""
    path = tmp_path / "config.yaml"
    save_config(make_config("name=cli"), path)
    return path
