"""Folder of a search: held-out examples share no group with the others, records are complete, other settings are refused."""

from __future__ import annotations

import dataclasses

import pytest
from letters import make_rows, prepare_letters

from finlora.data.example import Splits
from finlora.data.sets.catalog import task_named
from finlora.data.sets.prepared import read_prepared, write_prepared
from finlora.errors import ConfigError, DatasetError
from finlora.train.held_out import append_held_out, read_held_out
from finlora.train.run.run_folder import examine_run, load_training_set
from finlora.train.search.search_folder import (
    Mark,
    TrialRecord,
    TrialState,
    count_grace_steps,
    open_search,
    read_ended,
    read_record,
    split_examples,
    trial_config,
    write_record,
)
from finlora.train.search.space import SearchConfig, sample_trials

TASK = "synthetic_sentiment"


def test_held_out_examples_are_whole_groups_and_nothing_is_lost(prepared_synthetic, tmp_path):
    split_examples(prepared_synthetic, TASK, tmp_path, 0.2, 42)
    whole = read_prepared(prepared_synthetic, TASK, "train").examples
    train, held = (read_prepared(tmp_path, TASK, split).examples for split in ("train", "test"))
    assert sorted(item.id for item in (*train, *held)) == sorted(item.id for item in whole)
    assert {item.group for item in train} & {item.group for item in held} == set()
    groups = {item.group for item in whole}
    assert len({item.group for item in held}) == round(0.2 * len(groups))
    assert [item for item in whole if item in set(train)] == list(train)


def test_splitting_again_changes_nothing_and_another_seed_is_refused(prepared_synthetic, tmp_path):
    split_examples(prepared_synthetic, TASK, tmp_path, 0.2, 42)
    before = (tmp_path / TASK / "train.parquet").stat().st_mtime_ns
    split_examples(prepared_synthetic, TASK, tmp_path, 0.2, 42)
    assert (tmp_path / TASK / "train.parquet").stat().st_mtime_ns == before
    with pytest.raises(DatasetError, match="holds a different set"):
        split_examples(prepared_synthetic, TASK, tmp_path, 0.2, 43)


def test_one_group_cannot_be_split(prepared_synthetic, tmp_path):
    item = read_prepared(prepared_synthetic, TASK, "train").examples[0]
    splits = Splits(train=(item,), test=(item,))
    task = task_named(TASK)
    write_prepared(task, splits, tmp_path / "one", variant="v", source="s", version="0", overwrite=False, dry_run=False)
    with pytest.raises(DatasetError, match="expected at least two groups"):
        split_examples(tmp_path / "one", TASK, tmp_path / "out", 0.2, 42)


def test_trials_train_without_the_held_out_examples(make_config):
    config, search = make_config("name=s"), SearchConfig(num_trials=2)
    folder = open_search(config, search)
    trial = sample_trials(config, search)[1]
    own = trial_config(config, search, folder, trial, 7)
    assert (own.name, own.output_dir) == (trial.name, str(folder.trials))
    assert (own.train.checkpoint_every_steps, own.model.cache) == (7, str(folder.cache))
    held = len(read_prepared(folder.data, TASK, "test").examples)
    assert len(load_training_set(own).encoded) == len(load_training_set(config).encoded) - held
    kept = trial_config(make_config("name=s", "model.cache=/elsewhere"), search, folder, trial, 7)
    assert kept.model.cache == "/elsewhere"


def test_folder_of_another_search_or_run_is_refused(make_config):
    config = make_config("name=s")
    open_search(config, SearchConfig())
    open_search(config, SearchConfig(num_trials=50))
    for changes, section, words in (
        ([], {"rank": (2,)}, r"\(search.rank: \[4, 8, 16\] there, \[2\] here\).*another `name`"),
        (
            ["seed=7", "data.max_train_examples=9"],
            {},
            r"\(seed: 42 there, 7 here; data.max_train_examples: None there, 9 here\)",
        ),
    ):
        with pytest.raises(ConfigError, match="already holds a search with other settings " + words):
            open_search(make_config("name=s", *changes), SearchConfig(**section))
    with pytest.raises(ConfigError, match="holds a search, not a run"):
        examine_run(config)
    run = make_config("name=run")
    folder = open_search(run, SearchConfig())
    folder.config.unlink()
    with pytest.raises(ConfigError, match="holds something else than a search"):
        open_search(run, SearchConfig())


def test_search_counts_as_ended_only_with_a_record_of_each_trial(make_config):
    config, search = make_config("name=s"), SearchConfig(num_trials=2)
    folder = open_search(config, search)
    trials = sample_trials(config, search)
    ended = [
        TrialRecord(trial=trial, state=state, step=3, total_steps=3, held_out_loss=0.25)
        for trial, state in zip(trials, (TrialState.FINISHED, TrialState.FAILED), strict=True)
    ]
    write_record(folder, ended[0])
    assert read_ended(folder, search, trials) is None
    write_record(folder, ended[1])
    assert read_ended(folder, search, trials) == ended
    assert read_ended(folder, SearchConfig(num_trials=2, retry_failed=True), trials) is None
    assert read_ended(folder, search, sample_trials(config, SearchConfig(num_trials=3))) is None


def test_record_comes_back_equal(make_config):
    config, search = make_config("name=s"), SearchConfig(num_trials=1)
    folder = open_search(config, search)
    (trial,) = sample_trials(config, search)
    assert read_record(folder, trial) is None
    record = TrialRecord(
        trial=trial, state="finished", step=3, total_steps=3, held_out_loss=0.25, scores={"accuracy": 0.5}, seconds=1.5
    )
    write_record(folder, record)
    assert read_record(folder, trial) == record
    write_record(folder, dataclasses.replace(record, state="failed", cause="Model: gone"))
    again = read_record(folder, trial)
    assert (again.state, again.cause) == (TrialState.FAILED, "Model: gone")
    # Folders of earlier searches hold these words.
    assert [*TrialState, *Mark] == ["finished", "pruned", "failed", "busy", "unplaced", "pruned"]


def test_held_out_losses_come_back_in_step_order_without_a_broken_line(make_config):
    config, search = make_config("name=s"), SearchConfig(num_trials=1)
    run = open_search(config, search).run_of(sample_trials(config, search)[0])
    assert read_held_out(run) == []
    run.root.mkdir()
    for step, loss in ((4, 1.0), (8, 0.5), (4, 0.9)):
        append_held_out(run, step, loss)
    with (run.root / "held_out.jsonl").open("a") as stream:
        stream.write('{"step": 12, "held_o')
    found = [{"step": 4, "held_out_loss": 0.9}, {"step": 8, "held_out_loss": 0.5}]
    assert read_held_out(run) == found
    append_held_out(run, 16, 0.25)  # by the restarted worker: it must not become part of the broken line
    assert read_held_out(run) == [*found, {"step": 16, "held_out_loss": 0.25}]


def test_grace_is_at_least_a_step():
    assert count_grace_steps(SearchConfig(grace_share=0.1), 194) == 20
    assert count_grace_steps(SearchConfig(grace_share=0.01), 5) == 1


def test_task_split_by_time_holds_out_its_latest_examples(tmp_path):
    rows = make_rows(40, when=lambda row: f"2024-{1 + row // 4:02}-0{1 + row % 4}")
    source = prepare_letters(
        tmp_path, rows=rows, columns={"time": "when"}, split={"by": "time", "test_from": "2024-10-01", "gap_days": 20}
    )
    split_examples(source, "letters", tmp_path / "search", 0.25, 0)
    kept, held = (read_prepared(tmp_path / "search", "letters", part) for part in ("train", "test"))
    assert (max(item.time for item in kept.examples)[:10], len(kept.examples)) == ("2024-06-04", 24)
    assert (min(item.time for item in held.examples)[:10], len(held.examples)) == ("2024-07-04", 9)
    assert held.card == read_prepared(source, "letters", "train").card
