"""A config file of the tiny base for the command line."""

from __future__ import annotations

import pytest

from finlora.configfile import save_config


@pytest.fixture
def config_file(make_config, tmp_path):
    """A YAML file on the tiny base and the generated set."""
    path = tmp_path / "config.yaml"
    save_config(make_config("name=cli"), path)
    return path
