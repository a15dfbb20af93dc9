"""Results files: an exact round trip, and refusal of a broken line by file and number."""

from __future__ import annotations

import dataclasses
import json
import math
from datetime import datetime, timedelta

import pytest

from finlora.errors import ResultError
from finlora.report.pairing import pair_results
from finlora.results import Result, append_result, describe_environment, read_results


def make_result(**changes) -> Result:
    plain = {"kind": "evaluation", "task": "fpb", "variant": "base", "base": "demo", "bits": 8}
    return Result(**(plain | changes))


def test_result_round_trips(tmp_path):
    result = make_result(
        metrics={"accuracy": 0.5},
        counts={"up": {"down": 2, "(none)": 1}},
        loss_curve=[[1.0, 2.5], [2.0, 1.25]],
        config={"model": {"base": "demo", "bits": 8}},
        created="2026-01-02T03:04:05+00:00",
    )
    path = tmp_path / "new folder" / "results.jsonl"
    append_result(path, result)
    assert read_results(path) == [result]


def test_append_dates_result_and_keeps_earlier_lines(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, make_result(task="fpb"))
    append_result(path, make_result(task="ner"))
    assert [result.task for result in read_results(path)] == ["fpb", "ner"]
    assert all(result.created.endswith("+00:00") for result in read_results(path))


def test_clock_set_back_does_not_make_the_newer_result_the_older_one(tmp_path, monkeypatch):
    class SetBack(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) - timedelta(hours=1)

    path = tmp_path / "results.jsonl"
    append_result(path, make_result(metrics={"accuracy": 0.5}))
    monkeypatch.setattr("finlora.results.datetime", SetBack)
    append_result(path, make_result(metrics={"accuracy": 0.75}))
    before, after = results = read_results(path)
    assert after.created == before.created
    assert [each.result.metrics["accuracy"] for each in pair_results(results).kept] == [0.75]


def test_result_with_nan_and_line_separators_round_trips(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, make_result(metrics={"accuracy": math.nan}, counts={"a\u2028b\x85c": {"a\nb": 1}}))
    (result,) = read_results(path)
    assert math.isnan(result.metrics["accuracy"])
    assert result.counts == {"a\u2028b\x85c": {"a\nb": 1}}


def test_read_results_walks_folders_in_order(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "progress.jsonl").write_text('{"step": 1}\n')  # another record in the folder of results
    append_result(tmp_path / "b" / "results.jsonl", make_result(task="second"))
    append_result(tmp_path / "a" / "results.jsonl", make_result(task="first"))
    assert [result.task for result in read_results(tmp_path)] == ["first", "second"]


def test_broken_last_line_is_named_by_file_and_number(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, make_result())
    with path.open("a") as file:
        file.write('{"kind": "evalua')
    with pytest.raises(ResultError, match=r"results\.jsonl line 2 is not a result .* was changed: remove it"):
        read_results(path)


def test_append_after_broken_line_keeps_new_result_whole(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"kind": "evalua')
    append_result(path, make_result())
    lines = path.read_text().splitlines()
    assert lines[0] == '{"kind": "evalua'
    assert json.loads(lines[1])["task"] == "fpb"


def test_changed_number_is_named(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, make_result(metrics={"accuracy": 0.5}))
    path.write_text(path.read_text().replace('"accuracy": 0.5', '"accuracy": 0.9'))
    with pytest.raises(ResultError, match=r"line 1 is not a result \(it was changed after it was written"):
        read_results(path)


@pytest.mark.parametrize("line", ["[1, 2]", "3", '"text"', "null", '{"kind": "evaluation"}', '{"unknown": 1}'])
def test_line_of_other_shape_is_refused(tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ResultError, match=r"line 2 is not a result"):
        read_results(path)


def test_missing_or_empty_results_say_what_to_run(tmp_path):
    with pytest.raises(ResultError, match="does not exist: give a results file"):
        read_results(tmp_path / "absent")
    with pytest.raises(ResultError, match="holds no results: run"):
        read_results(tmp_path)


def test_environment_names_versions_and_device():
    environment = describe_environment()
    assert {"python", "machine", "torch", "ray", "device"} <= environment.keys()
    assert all(isinstance(value, str) for value in environment.values())


def test_result_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_result().task = "other"
