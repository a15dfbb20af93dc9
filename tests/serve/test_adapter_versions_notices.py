"""What a server says of the adapters that it serves before their answers are trusted."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
from live_server import make_settings
from made_facts import make_parity

from finlora.errors import AdapterError, ModelError
from finlora.evaluate.parity_report import write_parity
from finlora.model.contract import Adopted, read_contract, write_contract
from finlora.serve.adapter_versions import AdapterShelf
from finlora.serve.served_model import read_base


@pytest.fixture
def folder(adapters, tmp_path):
    """An adapter alone in its folder."""
    shutil.copytree(adapters / "plain", tmp_path / "adapters" / "plain")
    return tmp_path / "adapters"


def test_unknown_facts_of_an_adopted_adapter_are_a_notice(folder, tiny_base, caplog):
    shelf = AdapterShelf(folder, read_base(make_settings(tiny_base)))
    shelf.log_notices()
    assert caplog.messages == []
    origin = Adopted(source="owner/lora", base_named=None, tasks=["fpb"], unknown=["bits"], rewritten=[])
    write_contract(folder / "plain", dataclasses.replace(read_contract(folder / "plain"), bits=None, adopted=origin))
    words = "Adapter 'plain': Another program trained it (owner/lora). Unknown: bits."
    shelf.log_notices()
    shelf.log_notices()  # once for each state of its files
    first, second = caplog.messages
    assert first == words
    assert "It is served at 16 bit, and the bits of its training are unknown: adopt it again with --bits" in second


@pytest.fixture
def trained_at_4(folder):
    """The same adapter, as if it had been trained at 4 bit; the server holds the base at 16."""
    write_contract(folder / "plain", dataclasses.replace(read_contract(folder / "plain"), bits=4))
    return folder


def rows_of(folder, num_equal):
    """A parity report of its tasks at 16 bit."""
    contract = read_contract(folder / "plain")
    return [
        make_parity(task=task, form="16 bit", bits=16, num_rows=1000, num_equal=num_equal)
        for task in contract.task_names
    ]


def test_other_bits_than_in_training_are_a_notice_until_a_parity_report_covers_them(trained_at_4, tiny_base, caplog):
    base = read_base(make_settings(tiny_base))
    assert base.bits == 16
    shelf = AdapterShelf(trained_at_4, base)
    shelf.log_notices()
    (notice,) = caplog.messages
    assert notice.startswith(
        "Adapter 'plain': Trained at 4 bit, it is served at 16, and no parity report covers that: run"
    )
    write_parity(trained_at_4 / "plain", trained_at_4 / "plain", rows_of(trained_at_4, 980))
    assert shelf.find("plain").doubt == ""  # read again, since the file is new
    assert len(caplog.messages) == 1


def test_min_agreement_refuses_what_is_not_shown_and_what_is_below_it(trained_at_4, tiny_base, caplog):
    shelf = AdapterShelf(trained_at_4, read_base(make_settings(tiny_base)), min_agreement=0.98)
    words = r"'plain' is not shown to answer as it was trained, and this server requires it \(min_agreement=0.98\): trained at 4"
    with pytest.raises(AdapterError, match=words):
        shelf.find("plain")
    (notice,) = caplog.messages
    assert notice.startswith("Not served: adapter 'plain' is not shown to answer as it was trained")
    write_parity(trained_at_4 / "plain", trained_at_4 / "plain", rows_of(trained_at_4, 980))
    with pytest.raises(AdapterError, match=r"in 98\.0 \(96\.9–98\.7\) % of 1,000 rows of"):
        shelf.find("plain")
    write_parity(trained_at_4 / "plain", trained_at_4 / "plain", rows_of(trained_at_4, 995))
    assert shelf.find("plain").name == "plain"


def test_merged_base_without_a_report_is_refused_where_agreement_is_asked_for(tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    (base / "merged.yaml").write_text("onto: base\ncontract: {bits: 4, tasks: {}}\n")
    assert "merged onto the 16-bit base it is served at 16" in read_base(make_settings(base)).doubt
    with pytest.raises(
        ModelError, match=r"base is not shown to answer as it was trained, .*min_agreement=0\.9\): its adapter"
    ):
        read_base(make_settings(base, min_agreement=0.9))
