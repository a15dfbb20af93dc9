"""Adapter folder: complete adapters are served at once, versions are rolled back and forth, unfit ones are refused."""

from __future__ import annotations

import shutil

import pytest
from live_server import make_settings

from finlora.errors import AdapterError
from finlora.model.contract import read_contract, write_contract
from finlora.serve.adapter_versions import AdapterShelf
from finlora.serve.served_model import read_base


@pytest.fixture(scope="module")
def base(tiny_base):
    return read_base(make_settings(tiny_base))


@pytest.fixture
def folder(adapters, tmp_path):
    shutil.copytree(adapters, tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.fixture
def shelf(folder, base):
    return AdapterShelf(folder, base)


def test_complete_adapters_are_listed(shelf):
    assert shelf.list_names() == ["chatty", "good", "plain"]
    assert (shelf.list_versions("good"), shelf.list_versions("plain")) == (["v1", "v2"], [])
    assert (shelf.find("good").version, shelf.find("plain").version) == ("v2", None)


def test_unserved_folders_are_reported_with_the_reason(shelf, folder):
    (folder / "foreign").mkdir()
    (folder / "foreign" / "adapter_config.json").touch()
    reasons = shelf.describe_unserved()
    assert [line.split(" is a PEFT adapter that FinLoRA did not train: ")[0] for line in reasons] == [
        f"adapter {folder / name}" for name in ("foreign", "half")
    ]
    assert shelf.list_names() == ["chatty", "good", "plain"]


def test_no_folder_means_no_adapters(base, tmp_path):
    assert AdapterShelf(None, base).list_names() == AdapterShelf(tmp_path / "absent", base).list_names() == []


def test_newest_version_is_by_number(shelf, folder):
    shutil.copytree(folder / "good" / "v1", folder / "good" / "v10")
    assert shelf.find("good").version == "v10"


def test_roll_back_survives_a_restart_and_a_newer_version(shelf, folder, base):
    assert shelf.set_current("good", "v1").version == "v1"
    shutil.copytree(folder / "good" / "v2", folder / "good" / "v3")
    assert AdapterShelf(folder, base).find("good").version == "v1"
    assert shelf.find("good", "v3").version == "v3"
    assert shelf.set_current("good", None).version == "v3"
    assert shelf.find("good").version == "v3"


def test_new_weights_in_the_same_folder_are_another_adapter(shelf, folder):
    before = shelf.find("plain")
    assert shelf.find("plain") is before
    shutil.rmtree(folder / "plain")
    shutil.copytree(folder / "good" / "v1", folder / "plain")
    after = shelf.find("plain")
    assert after.hash != before.hash
    assert after.engine_name != before.engine_name


def test_run_folder_serves_its_adapter(shelf, folder):
    (folder / "run" / "checkpoint").mkdir(parents=True)
    assert "run" not in shelf.list_names()
    shutil.copytree(folder / "plain", folder / "run" / "adapter")
    assert shelf.list_names() == ["chatty", "good", "plain", "run"]
    assert (shelf.find("run").version, shelf.find("run").folder) == (None, folder / "run" / "adapter")
    assert shelf.find("run").hash == shelf.find("plain").hash


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda shelf: shelf.find("absent"), r"no adapter 'absent': expected one of chatty, good, plain"),
        (lambda shelf: shelf.find("../adapters/good"), r"no adapter '../adapters/good'"),
        (lambda shelf: shelf.find(".."), r"no adapter '..'"),
        (lambda shelf: shelf.find("half"), r"'half' is incomplete"),
        (lambda shelf: shelf.find("chatty"), r"template is raw, trained with chat"),
        (lambda shelf: shelf.find("good", "v9"), r"no version 'v9': expected one of v1, v2"),
        (lambda shelf: shelf.find("plain", "v1"), r"no version 'v1': expected one of none"),
        (lambda shelf: shelf.set_current("plain", "v1"), r"'plain' has no versions"),
        (lambda shelf: shelf.set_current("good", "v9"), r"no version 'v9'"),
    ],
)
def test_missing_or_unfit_adapter_is_refused_with_a_message(shelf, ask, words):
    with pytest.raises(AdapterError, match=words):
        ask(shelf)


def test_partly_copied_weights_are_refused(shelf, folder):
    path = folder / "plain" / "adapter_model.safetensors"
    whole = path.read_bytes()
    for part in (b"", whole[:100], whole[:-1]):
        path.write_bytes(part)
        with pytest.raises(AdapterError, match=r"adapter_model.safetensors differs. Copy the adapter again"):
            shelf.find("plain")
    path.write_bytes(whole)
    assert shelf.find("plain").name == "plain"


def test_missing_pinned_version_is_named(shelf, folder):
    shelf.set_current("good", "v1")
    shutil.rmtree(folder / "good" / "v1")
    with pytest.raises(AdapterError, match=r"set to version 'v1', which is not there: expected one of v2"):
        shelf.find("good")


def test_overflowing_adapter_fails_and_leaves_other_requests_intact(tiny_base, tmp_path):
    """Each weight is finite, their products are not. Requests without the adapter share its micro-batches and cache."""
    from live_server import live_server, make_adapter
    from safetensors.torch import load_file, save_file
    from wire import send

    config = make_settings(tiny_base, adapters_dir=str(tmp_path / "adapters"))
    folder = make_adapter(config.model, tmp_path / "adapters" / "huge", 1)
    path = folder / "adapter_model.safetensors"
    save_file({name: tensor.sign() * 1e30 for name, tensor in load_file(path).items()}, path)
    write_contract(folder, read_contract(folder))  # with the hash of the changed file
    ask = {"task": "fpb", "text": "Profit rose 12 %"}
    chat = {"messages": [{"role": "user", "content": "Profit"}], "max_tokens": 4}
    with live_server(config, tmp_path) as live:
        key = live.keys["desk"]
        (before,) = send(live.address, "/v1/classify", key, ask | {"model": "tiny"}).body["results"]
        for path, body in (("/v1/classify", ask), ("/v1/chat/completions", chat)):
            reply = send(live.address, path, key, body | {"model": "tiny:huge"})
            assert (reply.status, "computed NaN" in reply.text) == (422, True), reply.text
        streamed = send(live.address, "/v1/chat/completions", key, chat | {"model": "tiny:huge", "stream": True})
        assert "computed NaN" in streamed.text
        assert "[DONE]" not in streamed.text
        (after,) = send(live.address, "/v1/classify", key, ask | {"model": "tiny"}).body["results"]
        assert after["probabilities"] == pytest.approx(before["probabilities"], abs=1e-5)
        assert live.engine.snapshot.num_losses == 0
