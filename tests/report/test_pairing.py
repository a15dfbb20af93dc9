"""Pairing of results with their runs: each number of a report is its own run's, and results left out are named."""

from __future__ import annotations

import dataclasses
import json

from made_results import make_evaluation, make_training, print_report

from finlora.report.pairing import pair_results
from finlora.report.scores import score_table
from finlora.report.tables import cost_table
from finlora.results import Result, append_result, list_searches, read_results

OLD, NEW = "2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"


def make_run(name, *, digest=None, folder="/runs", created=OLD, base="/models/base", base_hash="b" * 16, **changes):
    """Return the fields by which a result's run is recognised."""
    return {
        "run": name,
        "adapter": f"{folder}/{name}/adapter",
        "adapter_hash": digest or f"{name}-weights",
        "base": base,
        "base_hash": base_hash,
        "task": "fpb",
        "created": created,
    } | changes


def names_of(paired):
    return [(each.run.name, each.result.kind) for each in paired.kept]


def test_two_runs_of_one_task_keep_their_own_results():
    """One was trained and scored, the other trained later and not scored."""
    results = [
        make_training(**make_run("first", wall_seconds=10.0)),
        make_evaluation(0.8, **make_run("first")),
        make_training(**make_run("second", created=NEW, wall_seconds=99.0)),
    ]
    paired = pair_results(results)
    assert names_of(paired) == [("first", "training"), ("first", "evaluation"), ("second", "training")]
    assert paired.left_out == ()
    assert [(row[1], row[4]) for row in score_table(paired).rows] == [("first", "80.0 (78.0–81.0)")]
    costs = cost_table(paired)
    time = costs.header.index("run time s")
    rows = [(row[0].split("\n")[0], row[time]) for row in costs.rows if "training" in row[1]]
    assert rows == [("first", "10"), ("second", "99")]
    assert "Trained and not evaluated: second." in score_table(paired).notes


def test_results_older_than_the_hashes_are_distinguished_by_their_folders():
    def strip(result: Result) -> Result:
        return dataclasses.replace(result, run=None, adapter_hash=None, base_hash=None, config={"name": "any"})

    results = [
        strip(make_training(**make_run("first"))),
        strip(make_evaluation(0.8, **make_run("second"))),
        strip(make_evaluation(0.7, **make_run("first"))),
    ]
    paired = pair_results(results)
    assert [each.result for each in paired.kept] == results
    first, second, again = (each.run for each in paired.kept)
    assert first == again
    assert (first.name, second.name) == ("any (first)", "any (second)")


def test_bases_in_folders_of_the_same_name_are_distinguished(tmp_path):
    results = [
        make_evaluation(0.3, variant="base", base="/a/base", base_hash="1" * 16),
        make_evaluation(0.6, variant="base", base="/b/base", base_hash="2" * 16),
        make_evaluation(0.9, **make_run("x", base="/b/base", base_hash="2" * 16)),
    ]
    paired = pair_results(results)
    assert [each.run.name for each in paired.kept] == ["base base (a/base)", "base base (b/base)", "x"]
    (row,) = [row for row in score_table(paired).rows if row[1] == "x"]
    assert row[2] == "base (b/base), 4bit-r4"
    assert row[-1] == "+30.0"  # against its own base


def test_base_replaced_in_its_folder_is_another_base():
    results = [
        make_evaluation(0.3, variant="base", base="/a/base", base_hash="1" * 16, created=OLD),
        make_evaluation(0.6, variant="base", base="/a/base", base_hash="2" * 16, created=NEW),
    ]
    paired = pair_results(results)
    assert [each.run.name for each in paired.kept] == [f"base base ({digit * 12})" for digit in "12"]


def test_one_base_under_two_names_is_one():
    results = [
        make_evaluation(0.3, variant="base", base="owner/Base", base_hash="1" * 16, created=OLD),
        make_evaluation(0.4, variant="base", base="/mirror/owner/Base", base_hash="1" * 16, created=NEW),
    ]
    paired = pair_results(results)
    assert [each.result.metrics["accuracy"] for each in paired.kept] == [0.4]
    assert [each.why for each in paired.left_out] == [f"superseded by that of {NEW}"]


def test_base_with_another_template_is_another_base():
    plain = make_evaluation(0.3, variant="base")
    chat = make_evaluation(0.6, variant="base", config={"model": {"template": "chat"}})
    assert [each.run.name.rpartition(", ")[2] for each in pair_results([plain, chat]).kept] == [
        "base Llama-3.1-8B-Instruct",
        "chat template",
    ]


def test_copied_adapter_belongs_to_its_run():
    results = [
        make_training(**make_run("mine", digest="d")),
        make_evaluation(**make_run("mine", digest="d", adapter="/served/desk")),
    ]
    first, second = pair_results(results).kept
    assert first.run == second.run


def test_scores_of_an_earlier_adapter_are_left_out_and_named():
    """The run's folder was emptied and the run trained again; its old results were kept."""
    results = [
        make_training(**make_run("mine", digest="one", created="2026-01-01")),
        make_evaluation(0.8, **make_run("mine", digest="one", created="2026-01-02")),
        make_training(**make_run("mine", digest="two", created="2026-01-03")),
    ]
    paired = pair_results(results)
    assert [each.result for each in paired.kept] == results[2:]
    why = "of an earlier adapter of this run (one), which was trained again"
    assert [(each.result, each.why) for each in paired.left_out] == [(results[0], why), (results[1], why)]


def test_newest_result_of_a_measurement_counts_and_older_ones_are_named():
    results = [make_evaluation(0.9, **make_run("mine", created=NEW)), make_evaluation(0.1, **make_run("mine"))]
    paired = pair_results(results)
    assert [each.result for each in paired.kept] == results[:1]
    assert [(each.run.name, each.why) for each in paired.left_out] == [("mine", f"superseded by that of {NEW}")]
    same_time = [make_evaluation(0.1), make_evaluation(0.2)]
    assert [each.result for each in pair_results(same_time).kept] == same_time[1:]  # the later line


def test_full_measurement_is_preferred_to_a_newer_partial_one():
    full = make_evaluation(0.8, **make_run("mine"))
    partial = make_evaluation(0.2, is_partial=True, **make_run("mine", created=NEW))
    paired = pair_results([full, partial])
    assert [each.result for each in paired.kept] == [full]
    assert paired.left_out[0].why == f"partial, beside a full one of {OLD}"


def test_measurements_of_different_kinds_are_all_shown():
    for change in ({"bits": 4}, {"method": "generate"}, {"task": "ner"}, {"variant": "base"}):
        assert len(pair_results([make_evaluation(), make_evaluation(**change)]).kept) == 2


def test_equal_names_are_distinguished_by_their_folders():
    results = [make_evaluation(**make_run("x", folder=folder, digest=folder)) for folder in ("/a/runs", "/b/runs")]
    assert [each.run.name for each in pair_results(results).kept] == ["x (a/runs)", "x (b/runs)"]


def test_every_result_is_shown_or_named():
    results = [
        result
        for number in range(6)
        for result in (
            make_training(**make_run(f"run{number % 3}", digest=f"{number % 4}", created=f"2026-01-0{number + 1}")),
            make_evaluation(**make_run(f"run{number % 2}", digest=f"{number % 5}", created=f"2026-01-1{number}")),
        )
    ]
    paired = pair_results(results)
    assert len(paired.kept) + len(paired.left_out) == len(results)
    assert {id(each.result) for each in (*paired.kept, *paired.left_out)} == {id(result) for result in results}


def test_lines_written_before_runs_were_recorded_are_read(tmp_path):
    path = tmp_path / "results.jsonl"
    append_result(path, make_evaluation())
    line = json.loads(path.read_text())
    for name in ("run", "adapter_hash", "base_hash", "waited_seconds", "attempts", "sha256"):
        line.pop(name)
    path.write_text(json.dumps(line) + "\n")
    (result,) = read_results(path)
    assert (result.run, result.attempts) == (None, None)
    assert "86.3" in print_report([result])


def test_searches_are_listed(tmp_path):
    (tmp_path / "search-fpb").mkdir()
    (tmp_path / "search-fpb" / "search.yaml").touch()
    assert list_searches(tmp_path) == [tmp_path / "search-fpb"]
    assert list_searches(tmp_path / "search-fpb") == []
