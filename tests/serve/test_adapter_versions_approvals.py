"""A server that requires approvals: refusals by name, at the start and later, and the newest approved version."""

from __future__ import annotations

import logging
import os
import shutil

import pytest
from live_server import live_server, make_settings
from wire import send

from finlora.card.approvals import APPROVALS_FILE, add_approval
from finlora.errors import AdapterError, ApprovalError
from finlora.serve.adapter_versions import AdapterShelf
from finlora.serve.served_model import read_base


@pytest.fixture(scope="module")
def base(tiny_base):
    return read_base(make_settings(tiny_base))


@pytest.fixture
def folder(adapters, tmp_path):
    return shutil.copytree(adapters, tmp_path / "adapters")


@pytest.fixture
def shelf(folder, base):
    return AdapterShelf(folder, base, require_approval=True)


def approve(folder, decision="approved"):
    return add_approval(folder, by="A. Validator", decision=decision)


def test_adapter_is_refused_until_it_is_approved(shelf, folder, caplog):
    words = r"adapter 'plain' is not approved, and this server requires it: nobody has approved it: .*`finlora approve"
    for _ in range(2):
        with caplog.at_level(logging.WARNING), pytest.raises(ApprovalError, match=words):
            shelf.find("plain")
    assert [record.message for record in caplog.records if "Not served: adapter 'plain'" in record.message] != []
    assert len(caplog.records) == 1  # told once, not with each request
    approve(folder / "plain")
    assert shelf.find("plain").name == "plain"
    assert shelf.list_unapproved("plain") == {}
    approve(folder / "plain", "rejected")
    with pytest.raises(ApprovalError, match=r"A. Validator rejected it"):
        shelf.find("plain")


def test_newest_approved_version_is_served(shelf, folder):
    with pytest.raises(ApprovalError, match=r"adapter 'good', version v2, is not approved"):
        shelf.find("good")
    approve(folder / "good" / "v1")
    assert shelf.find("good").version == "v1"
    assert list(shelf.list_unapproved("good")) == ["v2"]
    approve(folder / "good" / "v2")
    assert shelf.find("good").version == "v2"
    with pytest.raises(AdapterError, match=r"no version 'v3'"):
        shelf.find("good", "v3")


def test_version_that_is_set_must_be_approved_too(shelf, folder):
    approve(folder / "good" / "v2")
    with pytest.raises(ApprovalError, match=r"version v1, is not approved"):
        shelf.set_current("good", "v1")
    assert shelf.find("good").version == "v2"
    approve(folder / "good" / "v1")
    assert shelf.set_current("good", "v1").version == "v1"
    approve(folder / "good" / "v1", "rejected")
    with pytest.raises(ApprovalError, match=r"version v1, is not approved"):
        shelf.find("good")
    assert shelf.set_current("good", None).version == "v2"


def test_changed_adapter_and_changed_entry_are_refused_by_name(shelf, folder):
    approve(folder / "plain")
    shelf.find("plain")
    other = (folder / "good" / "v1" / "adapter_model.safetensors").read_bytes()
    path = folder / "plain" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(other)
    with pytest.raises(ApprovalError, match=r"its weights or settings have changed since A. Validator approved it"):
        shelf.find("plain")
    path.write_bytes(whole)
    assert shelf.find("plain").name == "plain"
    chain = folder / "plain" / APPROVALS_FILE
    chain.write_text(chain.read_text().replace("A. Validator", "B. Validator"))
    with pytest.raises(ApprovalError, match=r"its approvals are not intact: .*line 1"):
        shelf.find("plain")


def test_approval_of_another_adapter_does_not_count(shelf, folder):
    approve(folder / "good" / "v1")
    shutil.copy(folder / "good" / "v1" / APPROVALS_FILE, folder / "plain" / APPROVALS_FILE)
    with pytest.raises(ApprovalError, match=r"'plain' is not approved"):
        shelf.find("plain")


def test_shelf_without_the_setting_needs_no_approval(folder, base):
    shelf = AdapterShelf(folder, base)
    assert shelf.find("good").version == "v2"
    assert shelf.list_unapproved("good") == {}


def test_server_answers_with_approved_adapters_alone(tiny_base, folder, tmp_path):
    config = make_settings(tiny_base, adapters_dir=str(folder), require_approval=True)
    approve(folder / "good" / "v1")
    ask = {"task": "fpb", "text": "Profit rose 12 %"}
    with live_server(config, tmp_path) as live:
        key = live.keys["desk"]
        assert send(live.address, "/v1/classify", key, ask | {"model": "tiny"}).status == 200
        assert send(live.address, "/v1/classify", key, ask | {"model": "tiny:good"}).status == 200
        refused = send(live.address, "/v1/classify", key, ask | {"model": "tiny:plain"})
        assert (refused.status, refused.body["error"]["code"]) == (422, "adapter_not_approved")
        assert "run `finlora approve" in refused.body["error"]["message"]
        facts = {each["name"]: each for each in send(live.address, "/v1/adapters", key).body["data"]}
        assert (facts["good"]["current"], facts["good"]["unapproved"]) == ("v1", ["v2"])
        assert "is not approved" in facts["plain"]["refused"]
        shutil.copytree(folder / "plain", folder / "later")
        later = send(live.address, "/v1/classify", key, ask | {"model": "tiny:later"})
        assert (later.status, later.body["error"]["code"]) == (422, "adapter_not_approved")
        approve(folder / "later")
        assert send(live.address, "/v1/classify", key, ask | {"model": "tiny:later"}).status == 200


def test_check_before_the_start_names_each_adapter(tiny_base, folder, monkeypatch, caplog):
    from finlora.serve.deploy.serve_yaml import Deployment, check_server

    monkeypatch.setitem(os.environ, "FINLORA_API_KEY", "an-admin-key-of-the-tests")
    settings = make_settings(tiny_base, adapters_dir=str(folder), require_approval=True)
    deployment = Deployment(
        name="finlora", route_prefix="/", settings=settings, options={}, http={}, logging={}, proxy_location="HeadOnly"
    )
    with caplog.at_level(logging.WARNING):
        check_server(deployment, None, None, is_here=False)
    told = [record.message for record in caplog.records if "is not approved" in record.message]
    assert [line.partition(" is not")[0] for line in told] == [
        *(
            "Not served: adapter 'chatty'",
            "Not served: adapter 'good', version v1,",
            "Not served: adapter 'good', version v2,",
        ),
        "Not served: adapter 'plain'",
    ]
