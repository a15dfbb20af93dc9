"""Pareto front against hand-made cases, and the files that a search writes."""

from __future__ import annotations

import dataclasses
import io
import math

import pytest
from rich.console import Console

from finlora.config import DataConfig, RunConfig, TrainConfig
from finlora.configfile import load_config
from finlora.errors import FinloraError
from finlora.train.search.pareto import best_trial, front_table, measured, pareto_front, write_summary
from finlora.train.search.search_folder import SearchFolder, TrialRecord
from finlora.train.search.space import SearchConfig, Trial

BOTH = ("weighted_f1", "peak_memory_gib")


def make_record(number, state="finished", cause="", **scores):
    trial = Trial(
        name=f"{number:03d}", rank=4 + number, bits=4, learning_rate=1e-3, alpha=32.0, target_modules=("q_proj",)
    )
    return TrialRecord(
        trial=trial,
        state=state,
        step=100 if state == "finished" else 10,
        total_steps=100,
        held_out_loss=0.5,
        scores=scores,
        cause=cause,
        seconds=5.0,
    )


RECORDS = [
    make_record(0, weighted_f1=0.80, peak_memory_gib=6.0, hours=1.0),
    make_record(1, weighted_f1=0.85, peak_memory_gib=9.0, hours=1.0),
    make_record(2, weighted_f1=0.79, peak_memory_gib=6.0, hours=0.5),  # dominated by 0 if time does not count
    make_record(3, weighted_f1=0.85, peak_memory_gib=9.5, hours=2.0),
    make_record(4, "pruned", weighted_f1=0.99, peak_memory_gib=1.0, hours=0.1),
    make_record(5, "failed", "Resource: a worker's GPU ran out of memory"),
]


def names(records):
    return [record.trial.name for record in records]


def test_front_holds_what_no_other_finished_trial_beats():
    assert names(pareto_front(RECORDS, BOTH)) == ["000", "001"]
    assert names(pareto_front(RECORDS, (*BOTH, "hours"))) == ["000", "001", "002"]
    assert names(pareto_front(RECORDS, ("weighted_f1",))) == ["001", "003"]  # all equal ones stay
    assert pareto_front([], BOTH) == []


def test_trial_without_a_number_is_on_no_front():
    record = make_record(7, weighted_f1=math.nan, peak_memory_gib=0.1)
    assert names(pareto_front([*RECORDS, record, make_record(8, peak_memory_gib=0.1)], BOTH)) == ["000", "001"]


def test_best_is_first_in_the_first_objective_then_in_the_next():
    assert best_trial(RECORDS, BOTH).trial.name == "001"
    assert best_trial(RECORDS, ("accuracy",)) is not None
    assert best_trial(RECORDS[4:], BOTH) is None


def test_best_of_free_text_is_by_what_was_measured():
    """Free text has no weighted F1; a search with the default objectives must still find its best trial."""
    records = [make_record(n, accuracy=value, hours=1.0) for n, value in enumerate((0.2, 0.9, 0.5))]
    assert best_trial(records, ("weighted_f1", "accuracy", "hours")) is records[1]
    half = [make_record(7, weighted_f1=0.1, accuracy=0.1), make_record(8, accuracy=0.9)]
    assert best_trial(half, ("weighted_f1", "accuracy")) is half[0]


def test_objective_that_nothing_measures_is_left_out():
    assert measured(RECORDS, ("accuracy", *BOTH)) == BOTH


def test_table_shows_front_first_and_each_cause():
    table = front_table(RECORDS, ("weighted_f1", "accuracy", "peak_memory_gib", "hours"), on_gpu=True)
    assert table.header[-3:] == ("weighted F1 %", "peak GiB", "GPU-hours")
    assert [(row[0], row[2]) for row in table.rows] == [
        ("001", "finished, best, front"),
        ("000", "finished, front"),
        ("002", "finished, front"),
        ("003", "finished"),
        ("004", "pruned"),
        ("005", "failed"),
    ]
    assert table.header[1:4] == ("learning rate", "state", "steps")  # alpha and targets are the same in all
    assert table.rows[0][-3:] == ("85.0", "9.00", "1.0000")
    assert table.rows[5][-1] == "not measured"
    assert table.notes[0] == "005 failed. Resource: a worker's GPU ran out of memory"
    assert "4 finished, 1 pruned, 1 failed; 30 s of trials in all, 30 % of all steps saved by ASHA." in table.notes
    assert "worker-hours" in front_table(RECORDS, ("hours",), on_gpu=False).header


def test_table_shows_alpha_and_targets_where_they_vary():
    other = dataclasses.replace(RECORDS[1].trial, alpha=8.0, target_modules=("q_proj", "v_proj"))
    table = front_table([RECORDS[0], dataclasses.replace(RECORDS[1], trial=other)], BOTH, on_gpu=True)
    assert table.header[2:4] == ("alpha", "targets")
    assert {row[2:4] for row in table.rows} == {("32", "q"), ("8", "q+v")}


def test_summary_writes_table_plot_and_configs_ready_to_train(tmp_path):
    folder = SearchFolder(tmp_path)
    folder.cache.mkdir()
    config, stream = RunConfig(name="s"), io.StringIO()
    paths = write_summary(config, SearchConfig(objectives=BOTH), folder, RECORDS, Console(file=stream, width=140))
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        *("front.md", "front.png", "best.yaml", "front/000.yaml", "front/001.yaml")
    ]
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")
    assert "| 001 | 1.00e-03 |" in (tmp_path / "front.md").read_text()
    assert "001" in stream.getvalue()
    best = load_config(folder.best)
    assert (best.name, best.lora.rank, best.optim.learning_rate) == ("s-best", 5, 1e-3)
    assert (best.data, best.output_dir, best.model.cache) == (config.data, config.output_dir, None)
    assert load_config(paths[3]).name == "s-000"
    assert not folder.cache.exists()


def test_best_trains_on_all_examples_whatever_part_the_search_had(tmp_path):
    config = RunConfig(
        data=DataConfig(tasks=("fpb",), max_train_examples=500, max_test_examples=20), train=TrainConfig(max_steps=40)
    )
    folder, stream = SearchFolder(tmp_path), io.StringIO()
    folder.cache.mkdir()
    paths = write_summary(config, SearchConfig(objectives=BOTH), folder, RECORDS, Console(file=stream, width=140))
    for path in paths[2:]:
        written = load_config(path)
        assert (written.data, written.train.max_steps) == (DataConfig(tasks=("fpb",)), 40)
    text = (tmp_path / "front.md").read_text()
    assert "limited to 500 training examples; best.yaml and the configs of the front are not" in text
    assert "train.max_steps=40 is taken over" in text


def test_search_of_one_trial_draws_no_dot(tmp_path):
    folder, stream = SearchFolder(tmp_path), io.StringIO()
    folder.cache.mkdir()
    (tmp_path / "front.png").touch()  # of an earlier end, with trials that retry_failed removed
    paths = write_summary(RunConfig(), SearchConfig(objectives=BOTH), folder, RECORDS[3:], Console(file=stream))
    assert [path.name for path in paths] == ["front.md", "best.yaml", "003.yaml"]
    assert not (tmp_path / "front.png").exists()
    assert "One trial finished: there is nothing to compare it with" in (tmp_path / "front.md").read_text()


def test_search_in_which_nothing_finished_says_why(tmp_path):
    with pytest.raises(FinloraError, match=r"none of 2 trials finished: 1 x Resource: .*retry_failed=true") as caught:
        write_summary(RunConfig(), SearchConfig(), SearchFolder(tmp_path), RECORDS[4:], Console(file=io.StringIO()))
    assert "front.md" in str(caught.value)
    assert "005" in (tmp_path / "front.md").read_text()
