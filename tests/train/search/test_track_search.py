"""A search in a store: one run for it, nested ones for its trials, with their settings, losses and ends."""

from __future__ import annotations

import dataclasses

import pytest
from made_run import Memory, add_training, make_run

from finlora.configfile import config_to_tree
from finlora.errors import ConfigError
from finlora.train.held_out import append_held_out
from finlora.train.search.search_folder import Mark, TrialRecord, TrialState, open_search, trial_config, write_record
from finlora.train.search.space import SearchConfig, sample_trials
from finlora.train.search.track_search import TrackedSearch, export_folder

SEARCH = SearchConfig(num_trials=3, rank=(2, 8), bits=(16,))


@pytest.fixture
def searching(make_config, tmp_path):
    """Config, folder, trials and a store; the first trial has finished, the second trains, the third has not begun."""
    config = make_config("name=s", "tracking.mlflow=sqlite:////m.db")
    folder, trials = open_search(config, SEARCH), sample_trials(config, SEARCH)
    for trial in trials[:2]:
        run = make_run(folder.trials, f"lora.rank={trial.rank}", name=trial.name)
        append_held_out(run, 2, 0.5)
        (run.root / Mark.BUSY).touch()
    add_training(folder.run_of(trials[0]))
    end(folder, trials[0], TrialState.FINISHED, scores={"accuracy": 0.75})
    return config, folder, trials, Memory("mlflow", f"memory {tmp_path}", "finlora")


def end(folder, trial, state, **values):
    record = TrialRecord(trial=trial, state=state, step=4, total_steps=4, held_out_loss=0.5, **values)
    write_record(folder, record)
    (folder.run_of(trial).root / Mark.BUSY).unlink(missing_ok=True)


def by_name(store):
    return {run["card"].name: run for run in store.content.runs.values()}


def numbers_of(run):
    return {name: value for point in run["points"] for name, value in point.values.items()}


def test_trials_are_nested_with_their_hyperparameters_and_scores(searching):
    config, folder, (first, second, _third), store = searching
    TrackedSearch(config, SEARCH, folder, store).update()
    runs = by_name(store)
    assert set(runs) == {"s", first.name, second.name}
    assert runs["s"]["card"].parent is None
    assert runs["s"]["card"].params["search.rank"] == "2, 8"
    for trial in (first, second):
        card = runs[trial.name]["card"]
        assert store.content.runs[card.parent.run_id] is runs["s"]
        assert (card.params["lora.rank"], card.params["optim.learning_rate"]) == (
            str(trial.rank),
            str(trial.learning_rate),
        )
    numbers = numbers_of(runs[first.name])
    assert (numbers["train/loss"], numbers["held_out/held_out_loss"]) == (0.25, 0.5)
    assert (numbers["trial/accuracy"], numbers["trial/held_out_loss"]) == (0.75, 0.5)
    assert "adapter" not in runs[first.name]["files"]
    assert [state for state, _ in runs[first.name]["states"]] == ["finished"]
    assert runs[second.name]["states"] == []


def test_resumed_search_goes_on_in_its_runs_and_opens_no_ended_trial(searching):
    config, folder, (first, second, third), store = searching
    TrackedSearch(config, SEARCH, folder, store).update()
    opened = len(store.content.opened)
    end(folder, second, TrialState.PRUNED, cause="stopped by ASHA at step 4")
    end(folder, third, TrialState.FAILED, cause="out of memory")  # before its training began
    folder.best.write_text("name: s-best\n")
    again = TrackedSearch(config, SEARCH, folder, store)
    again.end(None)
    runs = by_name(store)
    assert len(store.content.runs) == 4
    assert store.content.opened[opened:].count("run-1") == 0  # that of the first trial
    assert [state for state, _ in runs[second.name]["states"]] == ["stopped"]
    assert [state for state, _ in runs[third.name]["states"]] == ["failed"]
    assert runs[third.name]["card"].params["lora.rank"] == str(third.rank)
    assert runs[third.name]["tags"]["finlora.cause"] == "out of memory"
    numbers = numbers_of(runs["s"])
    assert (numbers["best/accuracy"], numbers["trials/pruned"]) == (0.75, 1.0)
    assert runs["s"]["tags"]["finlora.best_trial"] == first.name
    assert [state for state, _ in runs["s"]["states"]] == ["finished"]


def test_trial_that_runs_again_is_logged_again(searching):
    config, folder, (_, second, _), store = searching
    end(folder, second, TrialState.FAILED, cause="out of memory")
    tracked = TrackedSearch(config, SEARCH, folder, store)
    tracked.update()
    run = folder.run_of(second).root
    (run / "trial.json").unlink()
    (run / Mark.BUSY).touch()
    tracked.update()
    end(folder, second, TrialState.FINISHED, scores={"accuracy": 0.5})
    tracked.update()
    assert [state for state, _ in by_name(store)[second.name]["states"]] == ["failed", "finished"]
    assert numbers_of(by_name(store)[second.name])["trial/accuracy"] == 0.5


def test_drivers_of_trials_write_tensorboard_only(searching):
    config, folder, (first, *_), _ = searching
    config = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, wandb="offline"))
    tracking = trial_config(config, SEARCH, folder, first, 1).tracking
    assert (tracking.tensorboard, tracking.mlflow, tracking.wandb) == (True, None, None)


def test_export_reads_the_searchs_settings_from_its_folder(searching, monkeypatch):
    config, folder, trials, _store = searching
    seen = []
    monkeypatch.setattr(TrackedSearch, "end", lambda self, state: seen.append(self))
    export_folder(folder.root, "wandb", None)
    (tracked,) = seen
    assert config_to_tree(tracked._config) == config_to_tree(config)
    assert (tracked._search, tracked._trials) == (SEARCH, trials)
    folder.config.write_text("search: 3\n")
    with pytest.raises(ConfigError, match=r"search.yaml is damaged: expected keys below search, found 3"):
        export_folder(folder.root, "wandb", None)
