"""XBRL rows: prompts kept verbatim, filings kept apart over both tasks."""

from __future__ import annotations

import json

import pytest

from finlora.data.tasks.xbrl import read_xbrl_tags, read_xbrl_values
from finlora.errors import DatasetError

TAG_SHOT, VALUE_SHOT = "Example answer: us-gaap:AnExampleTagName", "Example answer: 2540000000"


def row(filing, shot=TAG_SHOT, target="us-gaap:Cash"):
    return {"context": f'"<{target}>7</>\n{shot}\nQuestion: ?\n\nAnswer:', "target": target, "doc_path": filing}


def write(folder):
    files = {
        "xbrl_xbrl_tags_test.20250310.jsonl": [row("a")],
        "xbrl_value_test.20250310.jsonl": [row("b", VALUE_SHOT, "12")],
        "xbrl_xbrl_tags_test.20250313.jsonl": [row("a"), row("b"), row("c")],
        "xbrl_value_test.20250313.jsonl": [row("d", VALUE_SHOT, "34")],
    }
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in rows))
    return folder


def test_train_leaves_out_filings_of_either_test(tmp_path, ask):
    splits = read_xbrl_tags(ask(write(tmp_path)))
    assert [item.group for item in splits.train] == ["c"]
    assert splits.test[0].prompt == row("a")["context"]
    assert splits.test[0].choices == ()
    assert any("2 of 3 rows" in note for note in splits.notes)
    assert [item.answer for item in read_xbrl_values(ask(tmp_path)).train] == ["34"]


def test_missing_file_names_it(tmp_path, ask):
    (write(tmp_path) / "xbrl_value_test.20250310.jsonl").unlink()
    with pytest.raises(DatasetError, match=r"expected xbrl_value_test.20250310.jsonl"):
        read_xbrl_tags(ask(tmp_path))


def test_hub_rows_are_distinguished_by_their_shot(fake_hub, ask):
    fake_hub({"train": [row("a"), row("b", VALUE_SHOT, "12")], "test": [row("c")]})
    splits = read_xbrl_tags(ask(None))
    assert (len(splits.train), len(splits.test)) == (1, 1)
    with pytest.raises(DatasetError, match="none with the one shot of xbrl_values"):
        read_xbrl_values(ask(None))


@pytest.mark.shared_data
@pytest.mark.parametrize(("read", "counts"), [(read_xbrl_tags, (89, 115)), (read_xbrl_values, (95, 102))])
def test_counts_and_disjoint_filings(shared_data, ask, read, counts):
    splits = read(ask(shared_data / "xbrl"))
    assert (len(splits.train), len(splits.test)) == counts
    assert not {item.group for item in splits.train} & {item.group for item in splits.test}
    assert all(item.answer in item.prompt for item in (*splits.train, *splits.test))


@pytest.mark.shared_data
def test_filings_are_disjoint_over_tags_and_values_together(shared_data, ask):
    parts = [read(ask(shared_data / "xbrl")) for read in (read_xbrl_tags, read_xbrl_values)]
    train = {item.group for part in parts for item in part.train}
    test = {item.group for part in parts for item in part.test}
    assert len(test) == 15
    assert not train & test
