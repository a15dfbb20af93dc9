"""Report of parity: rows kept and replaced, damage refused, and what it shows of the bits at which an adapter is served."""

from __future__ import annotations

import dataclasses
import json

import pytest
from made_facts import make_contract, make_parity

from finlora.errors import AdapterError
from finlora.evaluate.parity_report import (
    find_doubt,
    find_merged_doubt,
    parity_table,
    read_parity,
    write_parity,
)

ROW = make_parity()
CONTRACT = make_contract(data_hashes={"fpb": "x"})


@pytest.fixture
def folder(tmp_path):
    """An adapter's two files."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def test_new_rows_replace_those_of_their_task_and_form_and_keep_others(folder):
    assert read_parity(folder) == ()
    other = dataclasses.replace(ROW, form="16 bit", bits=16)
    write_parity(folder, folder, [ROW, other])
    newer = dataclasses.replace(ROW, num_equal=500)
    write_parity(folder, folder, [newer])
    assert read_parity(folder) == (other, newer)


def test_report_of_another_adapter_or_with_a_change_is_refused(folder):
    write_parity(folder, folder, [ROW])
    path = folder / "parity.json"
    text = path.read_text()
    path.write_text(text.replace('"num_equal": 490', '"num_equal": 500'))
    with pytest.raises(
        AdapterError, match=r"parity\.json is not a report as `finlora parity` writes it .* write it again"
    ):
        read_parity(folder)
    path.write_text(text)
    (folder / "adapter_config.json").write_text('{"lora_alpha": 99}')
    with pytest.raises(AdapterError, match=r"parity\.json belongs to another adapter"):
        read_parity(folder)
    write_parity(folder, folder, [ROW])  # it is written anew
    assert read_parity(folder) == (ROW,)


@pytest.mark.parametrize("changes", [{"num_equal": 501}, {"num_rows": 0, "num_equal": 0}, {"bits": "8"}, {"new": 1}])
def test_row_that_cannot_be_is_refused(folder, changes):
    from finlora.durable import seal

    write_parity(folder, folder, [ROW])
    values = json.loads((folder / "parity.json").read_text())
    values["rows"][0] |= changes
    del values["sha256"]
    (folder / "parity.json").write_text(json.dumps(seal(values)))
    with pytest.raises(AdapterError, match="is not a report as"):
        read_parity(folder)


def test_doubt_names_what_is_missing_and_the_command(folder):
    assert find_doubt(folder, CONTRACT, 4) == ""
    words = "trained at 4 bit, it is served at 8, and no parity report covers that"
    assert find_doubt(folder, CONTRACT, 8) == f"{words}: run `finlora parity {folder} --bits 8`"
    write_parity(folder, folder, [ROW])
    assert find_doubt(folder, CONTRACT, 8) == ""
    two = dataclasses.replace(CONTRACT, data_hashes={"fpb": "x", "ner": "y"})
    assert find_doubt(folder, two, 8).startswith(f"{words} for ner: run")
    assert find_doubt(folder, CONTRACT, 16).startswith("trained at 4 bit, it is served at 16")
    assert find_doubt(folder, dataclasses.replace(CONTRACT, bits=None), 16).startswith(
        "it is served at 16 bit, and the bits of its training are unknown: adopt it again with --bits"
    )


def test_lower_end_of_the_interval_decides(folder):
    """Wilson's interval of 490 of 500: 96.4 to 98.9 %, by the formula of Brown, Cai and DasGupta (2001)."""
    write_parity(folder, folder, [ROW])
    assert find_doubt(folder, CONTRACT, 8, 0.96) == ""
    words = find_doubt(folder, CONTRACT, 8, 0.97)
    assert "as served (8 bit) it gives the answer of its training in 98.0 (96.4–98.9) % of 500 rows of fpb" in words
    assert (
        "min_agreement=0.97 asks for a lower end of 97 %: serve it at 4 bit, or merge it with --onto dequantised"
        in words
    )


def merged_folder(tmp_path, onto, bits=4):
    """The record of a merge."""
    folder = tmp_path / onto
    folder.mkdir()
    (folder / "merged.yaml").write_text(f"onto: {onto}\ncontract:\n  bits: {bits}\n")
    return folder


def test_merged_model_needs_a_report_of_its_own_weights(folder, tmp_path):
    assert find_merged_doubt(tmp_path, "m" * 16, 8) == ""  # no merged model
    plain, own = merged_folder(tmp_path, "base"), merged_folder(tmp_path, "dequantised")
    words = "its adapter was trained at 4 bit; merged onto the 16-bit base it is served at 16, and no parity report covers that"
    assert find_merged_doubt(plain, "m" * 16, 16) == f"{words}: run `finlora parity ADAPTER --merged {plain}`"
    assert find_merged_doubt(own, "m" * 16, 16) == ""  # the weights of the training
    assert "no parity report covers that" in find_merged_doubt(own, "m" * 16, 16, 0.9)
    assert find_merged_doubt(own, "m" * 16, 8).endswith(
        "is served at 8, and no parity report covers that: serve it at 16 bit"
    )
    row = dataclasses.replace(ROW, bits=None, form="merged onto the 16-bit base", base_hash="m" * 16)
    write_parity(plain, folder, [row])
    assert find_merged_doubt(plain, "m" * 16, 16, 0.96) == ""
    assert "serve base and adapter, or merge it with --onto dequantised" in find_merged_doubt(plain, "m" * 16, 16, 0.97)
    assert "no parity report" in find_merged_doubt(plain, "n" * 16, 16)  # its weights were changed since
    (plain / "merged.yaml").write_text("contract: []\n")
    assert find_merged_doubt(plain, "m" * 16, 16).startswith("its merged.yaml cannot be read")


def test_merge_into_a_16_bit_base_is_what_was_trained(tmp_path):
    folder = merged_folder(tmp_path, "base", bits=16)
    assert find_merged_doubt(folder, "m" * 16, 16, 0.99) == ""
    assert "is served at 4" in find_merged_doubt(folder, "m" * 16, 4)


def test_table_says_what_was_generated_and_what_is_a_part():
    rows = [ROW, dataclasses.replace(ROW, task="xbrl", is_partial=True, mean_difference=None, max_difference=None)]
    table = parity_table(rows)
    assert table.rows[0][:6] == ("fpb", "8 bit", "500", "98.0 (96.4–98.9)", "0.0100", "0.2000")
    assert table.rows[1][2:6] == ("500*", "98.0 (96.4–98.9)", "generated", "generated")
    assert len(table.notes) == 2
