"""What a server says of the adapters that it serves before their answers are trusted."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from live_server import make_settings

from finlora.model.contract import Adopted, read_contract, write_contract
from finlora.serve.adapter_versions import AdapterShelf
from finlora.serve.served_model import read_base


@pytest.fixture
def folder(adapters, tmp_path):
    """An adapter alone in its folder."""
    shutil.copytree(adapters / "plain", tmp_path / "adapters" / "plain")
    return tmp_path / "adapters"


def test_unknown_facts_of_an_adopted_adapter_are_a_notice(folder, tiny_base):
    shelf = AdapterShelf(folder, read_base(make_settings(tiny_base)))
    assert shelf.list_notices() == []
    origin = Adopted(source="owner/lora", base_named=None, tasks=["fpb"], unknown=["bits"], rewritten=[])
    write_contract(folder / "plain", dataclasses.replace(read_contract(folder / "plain"), bits=None, adopted=origin))
    words = "Adapter 'plain': Another program trained it (owner/lora). Unknown: bits."
    assert shelf.list_notices() == [words]
