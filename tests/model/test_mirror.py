"""Mirroring a model over HTTP from a hub on this machine: complete, checked, resumed, and refused if damaged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hub_server import COMMIT, NAME

from finlora.errors import ModelError
from finlora.model.mirror import check_mirrored, hash_file, list_mirrored

TEMPLATE = "[{{ messages[0].content }}]"
SERVER = Path(__file__).with_name("hub_server.py")


def ignore(*_progress):
    """Show nothing."""


@contextmanager
def hub_of(folder, damaged="none"):
    """Yield the address of a hub that serves the files of `folder` as one model."""
    command = [sys.executable, str(SERVER), str(folder), damaged]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.kill()


def run_online(endpoint, *arguments, **settings):
    """Run python in its own process: the hub's client reads its settings at import."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"} | settings
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def prefetch(endpoint, *arguments):
    return run_online(endpoint, "-m", "finlora.cli.main", "prefetch", *arguments)


@pytest.fixture(scope="module")
def published(tiny_base, tmp_path_factory):
    """The tiny base as on a hub: with a licence, chat templates in separate files, and unneeded files."""
    folder = tmp_path_factory.mktemp("published") / "tiny"
    shutil.copytree(tiny_base, folder)
    (folder / "LICENSE").write_text("for tests")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")  # as Mistral's repositories
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name in ("additional_chat_templates/rag.jinja", "original/params.json"):
        (folder / name).parent.mkdir()
        (folder / name).write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def mirror(published, tmp_path_factory):
    """A downloaded mirror of it, with a generated task."""
    folder = tmp_path_factory.mktemp("mirror")
    with hub_of(published) as endpoint:
        done = prefetch(endpoint, "--models", NAME, "--tasks", "synthetic_sentiment", "--output", folder)
    assert done.returncode == 0, done.stderr
    assert f"of commit {COMMIT[:12]}, hashes agree" in done.stdout
    return folder


@pytest.fixture
def copy(mirror, tmp_path):
    """A copy of the mirror for a test to damage."""
    return Path(shutil.copytree(mirror, tmp_path / "mirror"))


def test_mirror_holds_what_is_read_and_the_licence_and_nothing_else(mirror, published):
    (folder,) = list_mirrored(mirror)
    assert folder == mirror / "models" / NAME
    manifest = json.loads((folder / "mirror.json").read_text())
    assert manifest["commit"] == COMMIT
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == {*manifest["files"], "mirror.json"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "LICENSE"} <= set(manifest["files"])
    assert {"chat_template.jinja", "additional_chat_templates/rag.jinja"} <= set(manifest["files"])
    unneeded = {"pytorch_model.bin", "original/params.json", "consolidated.safetensors"}
    assert unneeded & set(manifest["files"]) == set()
    assert {name: hash_file(published / name) for name in manifest["files"]} == manifest["files"]


def test_mirrored_base_and_task_train_without_a_hub(mirror, make_config):
    from finlora.train.run.run_folder import describe_run, load_training_set

    config = make_config(f"model.base={mirror / 'models' / NAME}", f"data.dir={mirror / 'data'}")
    assert "optimiser steps" in describe_run(config, load_training_set(config))


def test_chat_template_in_a_file_of_its_own_is_the_same_however_the_model_came(mirror, published, tmp_path):
    """A hub id and a mirror include all of a model's templates, so their tokenizers hash like the published one."""
    from finlora.model.tokenizer import hash_tokenizer, load_tokenizer

    script = tmp_path / "ask.py"
    script.write_text(
        "from finlora.config import ModelConfig\n"
        "from finlora.model.source import find_source\n"
        "from finlora.model.tokenizer import hash_tokenizer, load_tokenizer\n"
        f"tokenizer = load_tokenizer(find_source(ModelConfig(base={NAME!r})).tokenizer_path)\n"
        "print(hash_tokenizer(tokenizer), tokenizer.get_chat_template())\n"
    )
    with hub_of(published) as endpoint:
        done = run_online(endpoint, script, HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == 0, done.stderr
    expected = hash_tokenizer(load_tokenizer(published))
    assert done.stdout.split() == [expected, *TEMPLATE.split()]
    assert hash_tokenizer(load_tokenizer(mirror / "models" / NAME)) == expected


def test_check_needs_no_hub_and_names_each_damaged_file(copy):
    nowhere = "http://127.0.0.1:9"
    done = prefetch(nowhere, "--check", "--output", copy)
    assert done.returncode == 0, done.stderr
    assert "synthetic_sentiment, hashes agree" in done.stdout
    folder = copy / "models" / NAME
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").unlink()
    with pytest.raises(
        ModelError, match=r"differs from bank/tiny at .*config.json is missing, model.safetensors differs"
    ):
        check_mirrored(folder, ignore)


def test_prefetch_repairs_what_is_damaged_and_keeps_the_rest(copy, published):
    folder = copy / "models" / NAME
    untouched = (folder / "tokenizer.json").stat().st_mtime_ns
    (folder / "model.safetensors").write_bytes(b"cut short")
    with hub_of(published) as endpoint:
        assert prefetch(endpoint, "--models", NAME, "--output", copy).returncode == 0
    assert hash_file(folder / "model.safetensors") == hash_file(published / "model.safetensors")
    assert (folder / "tokenizer.json").stat().st_mtime_ns == untouched


def test_adapter_is_mirrored_beside_the_models_and_checked_with_them(tmp_path):
    published = tmp_path / "published"
    published.mkdir()
    for name in ("adapter_config.json", "adapter_model.bin", "tokenizer.json", "optimizer.pt"):
        (published / name).write_text("{}")
    with hub_of(published) as endpoint:
        done = prefetch(endpoint, "--adapters", NAME, "--output", tmp_path / "mirror")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mirror" / "adapters" / NAME
    assert f"finlora adopt {folder}: 0.00 GiB of commit {COMMIT[:12]}, hashes agree" in done.stdout
    there = {path.name for path in folder.iterdir()}
    assert there == {"adapter_config.json", "adapter_model.bin", "tokenizer.json", "mirror.json"}
    assert list_mirrored(tmp_path / "mirror") == [folder]
    (folder / "tokenizer.json").write_text("[]")
    with pytest.raises(ModelError, match=r"tokenizer\.json differs"):
        check_mirrored(folder, ignore)


def test_file_that_arrives_with_another_hash_is_removed_and_named(published, tmp_path):
    with hub_of(published, damaged="model.safetensors") as endpoint:
        done = prefetch(endpoint, "--models", NAME, "--output", tmp_path)
    assert done.returncode == 4
    assert "model.safetensors has another size or hash than the hub names, and was deleted" in done.stderr
    assert list_mirrored(tmp_path) == []
    assert not (tmp_path / "models" / NAME / "model.safetensors").exists()


def test_unreachable_hub_and_unknown_model_are_shown(published, tmp_path):
    with hub_of(published) as endpoint:
        done = prefetch(endpoint, "--models", "bank/other", "--output", tmp_path)
    assert done.returncode == 4
    assert (
        "bank/other could not be downloaded from the hub (HfHubHTTPError: Client error '404 Not Found'" in done.stderr
    )
    assert "copy the mirror folder over" in done.stderr
    done = prefetch("http://127.0.0.1:9", "--models", NAME, "--output", tmp_path)
    assert done.returncode == 4
    assert (
        "bank/tiny could not be downloaded (127.0.0.1 does not answer: Connection refused): prefetch on" in done.stderr
    )
    done = prefetch("http://127.0.0.1:9", "--output", tmp_path)
    assert done.returncode == 2
    assert "give either --check, or what to fetch" in done.stderr
