"""Approvals: a hash chain bound to the adapter's files, in which every change is named."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import threading

import pytest
from carded import make_run

from finlora.card.approvals import APPROVALS_FILE, add_approval, judge_approvals, read_approvals, require_heads
from finlora.errors import AdapterError, ConfigError
from finlora.model.contract import read_contract, write_contract


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("approvals"))


@pytest.fixture
def adapter(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "adapter")


def test_last_decision_counts_and_each_entry_holds_the_hash_of_the_one_before(adapter, tmp_path):
    assert "nobody has approved it: have it judged, then run `finlora approve" in judge_approvals(adapter).refusal
    card = tmp_path / "card.html"
    card.write_text("read")
    first = add_approval(adapter, by=" A. Validator ", decision="approved", note="for news", card=card)
    assert judge_approvals(adapter).is_approved
    second = add_approval(adapter, by="B. Owner", decision="rejected", note="secret reason")
    state = judge_approvals(adapter)
    assert state.entries == (first, second)
    assert (first.by, first.previous, second.previous) == ("A. Validator", "0" * 64, first.hash)
    assert first.card_hash == hashlib.sha256(b"read").hexdigest()
    assert state.refusal.startswith(f"B. Owner rejected it on {second.time[:10]}: it stays out")
    assert "secret" not in state.refusal
    add_approval(adapter, by="B. Owner", decision="approved")
    assert judge_approvals(adapter).is_approved


def test_entry_is_bound_to_weights_and_settings(adapter):
    entry = add_approval(adapter, by="A", decision="approved")
    files = [adapter / name for name in ("adapter_model.safetensors", "adapter_config.json")]
    assert entry.adapter_hash == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    assert entry.contract_hash == hashlib.sha256((adapter / "finlora.yaml").read_bytes()).hexdigest()
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole + b"!")
        assert (
            "its weights or settings have changed since A approved it: they hash to" in judge_approvals(adapter).refusal
        )
        file.write_bytes(whole)
    assert judge_approvals(adapter).is_approved
    write_contract(adapter, dataclasses.replace(read_contract(adapter), template="chat"))
    assert "its finlora.yaml has changed since A approved it" in judge_approvals(adapter).refusal


def test_readme_and_approvals_change_no_hash_of_the_adapter(adapter):
    before = read_contract(adapter)
    add_approval(adapter, by="A", decision="approved")
    (adapter / "README.md").write_text("edited by hand")
    read_contract(adapter).check_files(adapter)
    assert read_contract(adapter) == before
    assert judge_approvals(adapter).is_approved


def test_changed_adapter_is_not_approved_at_all(adapter):
    (adapter / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(AdapterError, match=r"has changed since it was written: adapter_model.safetensors differs"):
        add_approval(adapter, by="A", decision="approved")
    assert not (adapter / APPROVALS_FILE).exists()


def lines_of(adapter):
    return (adapter / APPROVALS_FILE).read_text().splitlines(keepends=True)


def reseal(line, **changes):
    """Change an entry as one would who knows how its line is hashed, but not the hash that the next line holds."""
    values = json.loads(line)
    values.pop("sha256")
    values |= changes
    values.pop("hash")
    text = json.dumps(values, sort_keys=True, ensure_ascii=False)
    return json.dumps({**values, "hash": hashlib.sha256(text.encode()).hexdigest()}) + "\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda lines: [lines[0].replace("rejected", "approved"), *lines[1:]],
            r"line 1 is not an approval .*was changed",
        ),
        (lambda lines: lines[1:], r"line 1 does not follow the line before it: an entry was removed"),
        (lambda lines: [lines[0], lines[2]], r"line 2 does not follow"),
        (lambda lines: [lines[1], lines[0], lines[2]], r"line 1 does not follow"),
        (lambda lines: [reseal(lines[0], decision="approved"), *lines[1:]], r"line 2 does not follow"),
        (lambda lines: [reseal(lines[0], by=7), *lines[1:]], r"line 1 is not an approval .*a value is not a text"),
        (lambda lines: [*lines, lines[2][:40]], r"line 4 is not an approval"),
        (lambda lines: [*lines, "[]\n"], r"line 4 is not an approval"),
    ],
)
def test_changed_removed_or_inserted_entry_is_named(adapter, change, words):
    for decision in ("rejected", "rejected", "approved"):
        add_approval(adapter, by="A", decision=decision)
    (adapter / APPROVALS_FILE).write_text("".join(change(lines_of(adapter))))
    with pytest.raises(AdapterError, match=words):
        read_approvals(adapter)
    state = judge_approvals(adapter)
    assert state.refusal.startswith("its approvals are not intact: ")
    before = lines_of(adapter)
    with pytest.raises(AdapterError, match=words):  # nobody can go on behind a broken chain
        add_approval(adapter, by="A", decision="approved")
    assert lines_of(adapter) == before


def test_hash_of_an_entry_alone_is_found_changed(adapter):
    add_approval(adapter, by="A", decision="approved")
    values = json.loads(lines_of(adapter)[0])
    values.pop("sha256")
    (adapter / APPROVALS_FILE).write_text(json.dumps(values | {"note": "new"}))
    with pytest.raises(AdapterError, match=r"line 1 was changed after it was written \(entry of 'A'"):
        read_approvals(adapter)


def test_link_to_a_file_elsewhere_is_refused(adapter, tmp_path):
    (tmp_path / "elsewhere").write_text("")
    (adapter / APPROVALS_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError, match=r"is a link to a file outside of the folder"):
        add_approval(adapter, by="A", decision="approved")
    assert "a link to a file outside" in judge_approvals(adapter).refusal


def test_two_people_at_once_make_one_chain(adapter):
    threads = [
        threading.Thread(target=add_approval, args=(adapter,), kwargs={"by": name, "decision": "approved"})
        for name in "abcdef"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.by for entry in read_approvals(adapter)) == list("abcdef")


def test_chain_that_was_cut_or_written_anew_lacks_the_entries_known_from_elsewhere(adapter, call, tmp_path):
    add_approval(adapter, by="A", decision="approved")
    last = add_approval(adapter, by="B", decision="rejected")
    (adapter / APPROVALS_FILE).write_text(lines_of(adapter)[0])
    assert judge_approvals(adapter).is_approved  # the chain alone does not show it
    code, _, error = call("card", adapter, "--output", tmp_path / "card", "--head", last.hash)
    assert (code, f"holds no entry {last.hash!r}: entries were cut off" in " ".join(error.split())) == (4, True)
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"by": " "}, r"--by is empty"),
        ({"note": "two\nlines"}, r"--note has 9 characters: expected one line"),
        ({"by": "x" * 2001}, r"--by has 2,001 characters"),
    ],
)
def test_text_that_is_no_line_is_refused(adapter, values, words):
    with pytest.raises(ConfigError, match=words):
        add_approval(adapter, **{"by": "A", "decision": "approved"} | values)


def test_verb_records_the_decision_and_shows_its_hash(call, adapter, tmp_path):
    code, out, _ = call("approve", adapter, "--by", "A. Validator", "--decision", "approved")
    (entry,) = read_approvals(adapter)
    assert code == 0
    require_heads(adapter, [entry], [entry.hash.upper()])
    assert f"A. Validator approved adapter {entry.adapter_hash[:16]}" in out
    assert f"Hash of this entry, to keep elsewhere: {entry.hash}" in out
    code, _, error = call("approve", adapter, "--by", "A", "--decision", "perhaps")
    assert code == 2
    code, _, error = call("approve", adapter, "--by", "A", "--decision", "approved", "--card", tmp_path / "absent")
    assert (code, "--card" in error, "cannot be read" in error) == (2, True, True)
    code, _, error = call("approve", tmp_path, "--by", "A", "--decision", "approved")
    assert code == 4
