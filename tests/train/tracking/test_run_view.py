"""What a tracking system gets of a run's folder."""

from __future__ import annotations

import fcntl

import pytest
from made_run import STARTED_MS, add_evaluation, add_step, add_training, make_run

from finlora.errors import ResultError
from finlora.train.run.run_folder import RunFolder
from finlora.train.tracking.run_view import list_params, read_view
from finlora.train.tracking.tracker import RunState


def test_settings_are_texts_by_their_keys_without_addresses(tmp_path):
    folder = make_run(tmp_path, "lora.rank=8", "data.tasks=[fpb,tfns]", "tracking.mlflow=sqlite:////m.db")
    params = read_view(folder).card.params
    assert (params["lora.rank"], params["data.tasks"], params["eval.bits"]) == ("8", "fpb, tfns", "8")
    assert params["model.revision"] == "None"
    assert [name for name in params if "tracking" in name] == []
    assert list_params({"a": {"b": [1, 2]}, "c": 1e-4}) == {"a.b": "1, 2", "c": "0.0001"}


def test_points_carry_the_time_of_their_steps(tmp_path):
    """8 examples a step at 4 a second: step 2 ends 4 s after the start of the run, step 4 another 4 s later."""
    view = read_view(make_run(tmp_path))
    (curve,) = view.curves.values()
    assert [(point.step, point.at_ms - STARTED_MS) for point in curve] == [(2, 4_000), (4, 8_000)]
    assert curve[0].values == {
        "train/loss": 0.5,
        "train/learning_rate": 0.1,
        "train/epoch": 0.5,
        "train/memory_gib": 1.5,
        "train/tokens_per_second": 100.0,
        "train/examples_per_second": 4.0,
    }
    assert view.card.started_ms == STARTED_MS
    assert view.ended_ms == STARTED_MS + 8_000


def test_step_that_ran_twice_counts_once(tmp_path):
    folder = make_run(tmp_path, steps=(2, 4, 6))
    add_step(folder, 4)
    assert [point.step for point in read_view(folder).curves["train"]] == [2, 4, 6]


def test_scores_have_intervals_and_the_name_of_what_was_scored(tmp_path):
    folder = make_run(tmp_path)
    add_training(folder)
    add_evaluation(folder)
    add_evaluation(folder, adapter=None, accuracy=0.5)
    add_evaluation(folder, adapter="other")
    training, own, base, other = read_view(folder).scores.values()
    assert training.values == {
        "run/loss_first": 0.5,
        "run/loss_last": 0.25,
        "run/wall_seconds": 20.0,
        "run/attempts": 1.0,
        "run/bytes_sent": 60.0,
        "run/num_examples": 0.0,
    }
    interval = {"test/fpb/accuracy_low": 0.65, "test/fpb/accuracy_high": 0.85}
    assert own.values == pytest.approx({"test/fpb/accuracy": 0.75, **interval, "test/fpb/num_examples": 40})
    assert (own.step, own.at_ms) == (4, STARTED_MS + 120_000)
    assert base.values["base/fpb/accuracy"] == 0.5
    assert other.values["adapter other/fpb/accuracy"] == 0.75
    assert "held_out/fpb/accuracy" in read_view(folder, split="held_out").scores["result 1"].values


def test_files_and_tags_of_a_finished_run(tmp_path):
    folder = make_run(tmp_path)
    assert [path.name for path in read_view(folder).files] == ["config.yaml", "plan.txt"]
    add_training(folder)
    view = read_view(folder)
    assert [path.name for path in view.files] == ["config.yaml", "plan.txt", "results.jsonl", "adapter"]
    assert view.tags == {
        "finlora.folder": str(folder.root),
        "finlora.adapter_hash": "ab12",
        "finlora.variant": "4bit-r4",
        "finlora.task": "fpb",
        "finlora.torch": "2.11",
    }


def test_adapter_stays_where_the_settings_say_so(tmp_path):
    folder = make_run(tmp_path, "tracking.adapter=false")
    add_training(folder)
    assert "adapter" not in [path.name for path in read_view(folder).files]


def test_state_of_a_folder(tmp_path):
    folder = make_run(tmp_path)
    assert read_view(folder).state == RunState.STOPPED
    with folder.lock.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert read_view(folder).state == RunState.RUNNING
    add_training(folder)
    assert read_view(folder).state == RunState.FINISHED


def test_evaluation_of_a_base_alone_is_a_run_of_its_own(tmp_path, make_config):
    from finlora.configfile import config_to_tree
    from finlora.results import Result, append_result

    config = make_config("name=alone")
    folder = RunFolder(tmp_path / "alone")
    append_result(
        folder.results,
        Result(
            kind="evaluation",
            task="fpb",
            variant="base",
            base="b",
            bits=16,
            config=config_to_tree(config),
            created="2026-11-30T12:00:00+00:00",
        ),
    )
    view = read_view(folder)
    assert (view.card.name, view.card.started_ms, view.state) == ("alone", STARTED_MS, RunState.FINISHED)
    assert view.tags["finlora.variant"] == "base"


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(ResultError, match=r"holds no run: expected config\.yaml or results\.jsonl"):
        read_view(RunFolder(tmp_path))
