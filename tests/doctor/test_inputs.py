"""Findings about a config's inputs: base, template, hub and prepared rows."""

from __future__ import annotations

import dataclasses

import pytest

from finlora.data.example import Example
from finlora.doctor import inputs
from finlora.model.source import find_source
from finlora.model.tokenizer import load_tokenizer

ROW = Example(
    id="fpb-train-0", task="fpb", prompt="Profit rose.", answer="positive", label="positive",
    choices=("negative", "neutral", "positive"), source="a.csv:1", group="g",
)  # fmt: skip


def told(findings):
    return [(finding.level, finding.code, finding.found) for finding in findings]


def test_row_without_a_label_token_is_named():
    rows = [ROW, dataclasses.replace(ROW, id="fpb-train-1", answer=" ", source="a.csv:2")]
    (found,) = inputs.check_rows("fpb train", rows)
    assert (found.level, found.code) == ("fault", 3)
    assert found.found == "1 of 2 rows have no label token, first fpb-train-1 (a.csv:2)"


def test_answer_that_is_no_choice_is_named():
    (found,) = inputs.check_rows("fpb train", [dataclasses.replace(ROW, answer="Positive")])
    assert found.found == "1 of 1 rows have an answer that is not one of their choices, first fpb-train-0 (a.csv:1)"
    assert told(inputs.check_rows("x", [dataclasses.replace(ROW, choices=(), answer="any")]))[0][0] == "ok"


def test_rows_over_the_length_are_counted(make_config):
    config = make_config("model.max_seq_len=8")
    tokenizer = load_tokenizer(find_source(config.model).tokenizer_path)
    found = inputs.check_lengths("fpb train", [ROW] * 3, tokenizer, config, None)
    assert (found.level, found.code) == ("fault", 3)
    assert found.found.startswith("3 rows are longer than model.max_seq_len=8, up to ")
    assert found.found.endswith("(all 3 rows)")
    longest = int(found.advice.split("=")[1].split(",")[0])
    fits = make_config(f"model.max_seq_len={longest}")
    assert inputs.check_lengths("fpb train", [ROW] * 3, tokenizer, fits, None).level == "ok"
    skips = make_config("model.max_seq_len=8", "data.too_long=skip")
    assert inputs.check_lengths("fpb train", [ROW] * 3, tokenizer, skips, None).level == "warning"


def test_a_part_of_many_rows_is_looked_at_and_reported(make_config, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_ROWS", 4)
    config = make_config()
    tokenizer = load_tokenizer(find_source(config.model).tokenizer_path)
    assert "(4 of 10 rows checked)" in inputs.check_lengths("x", [ROW] * 10, tokenizer, config, None).found


def test_good_base_and_data_are_well(make_config):
    config = make_config()
    found, base = inputs.check_base(config.model)
    assert {finding.level for finding in found} == {"ok"}
    assert {finding.level for finding in inputs.check_data(config, base)} == {"ok"}


def test_missing_template_base_and_split_have_their_codes(make_config, tmp_path):
    config = make_config("model.template=chat", f"data.dir={tmp_path}")
    assert told(inputs.check_base(config.model)[0])[-1][:2] == ("fault", 4)
    assert [finding.code for finding in inputs.check_data(config, None)] == [3, 3]
    absent = dataclasses.replace(config.model, base=str(tmp_path / "absent"))
    assert [finding.code for finding in inputs.check_base(absent)[0]] == [4]


@pytest.mark.parametrize(
    ("environment", "level", "words"),
    [
        ({"HF_HUB_OFFLINE": "1"}, "ok", "not checked, since HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "warning", "127.0.0.1 does not answer: Connection refused"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "https_proxy": "http://p:1"}, "ok", "behind the proxy of https_proxy"),
    ],
)
def test_hub_is_asked_where_it_is_meant(monkeypatch, environment, level, words):
    for name in ("HF_HUB_OFFLINE", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (found,) = inputs.check_hub(None)
    assert (found.level, words in found.found) == (level, True)
