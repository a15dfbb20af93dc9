"""Refusals and finished runs of `train` and `tune`, reported before Ray starts or is joined."""

from __future__ import annotations

import dataclasses

import pytest
from made_facts import make_contract

from finlora.model.contract import write_contract
from finlora.results import Result, append_result, read_results
from finlora.train.run.run_folder import RunFolder, claim_run, open_run
from finlora.train.search.search_folder import open_search
from finlora.train.search.space import SearchConfig

TINY_SEARCH = ("search.num_trials=3", "search.bits=[16]", "search.rank=[2,4]")


@pytest.fixture(autouse=True)
def no_ray(monkeypatch):
    """Fail if a verb uses Ray."""

    def fail(**_settings):
        raise AssertionError("this verb starts Ray")

    monkeypatch.setattr("finlora.cluster.connect.prepare", fail)
    monkeypatch.setattr("finlora.cluster.connect.connect", fail)


@pytest.fixture
def finished(make_config):
    """The folder of a run with an adapter, its contract and its result."""
    config = make_config("name=cli")
    folder = open_run(config)
    folder.plan.write_text("Training packed: a pack\n")
    folder.step.write_text("4 4")
    folder.adapter.mkdir()
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    write_contract(folder.adapter, make_contract())
    result = Result(
        kind="training",
        task="fpb",
        variant="4bit-r4",
        base="b",
        bits=4,
        run="cli",
        adapter=str(folder.adapter),
        adapter_mib=0.1,
        metrics={"loss_first": 6.0, "loss_last": 5.5},
        wall_seconds=75.0,
        waited_seconds=0.0,
        attempts=1,
    )
    append_result(folder.results, result)
    return folder


def test_run_with_other_settings_is_refused_without_its_old_progress(call, config_file, finished):
    code, out, err = call("train", "-c", config_file, "lora.rank=8")
    assert (code, out) == (2, "")
    assert "already holds a run with other settings (lora.rank: 4 there, 8 here)" in " ".join(err.split())


def test_run_of_another_driver_is_refused(call, config_file, finished):
    with claim_run(finished):
        code, out, err = call("train", "-c", config_file)
    assert (code, out) == (5, "")
    assert "is in use by process " in " ".join(err.split())


def test_finished_run_is_shown_as_when_it_ended(call, config_file, finished):
    code, out, err = call("train", "-c", config_file, "train.log_every_steps=3")  # a setting that may change
    assert (code, err) == (0, "")
    (line,) = out.splitlines()
    assert line.startswith(f"Adapter {finished.adapter} (0.10 MiB): loss 6.0000 -> 5.5000 in 1:15. ")
    assert line.endswith("The run is finished: nothing was started. Choose another `name` to train again.")


def test_a_run_with_one_point_of_loss_tells_no_course(call, config_file, finished):
    result = dataclasses.replace(read_results(finished.results)[0], loss_curve=[[3.0, 5.5]])
    finished.results.unlink()
    append_result(finished.results, result)
    code, out, _ = call("train", "-c", config_file)
    assert (code, out.count("loss 5.5000 (one point) in 1:15. ")) == (0, 1)


@pytest.mark.parametrize("lost", ["adapter/adapter_model.safetensors", "adapter/finlora.yaml", "results.jsonl"])
def test_run_that_lacks_a_part_goes_on(call, config_file, finished, lost, monkeypatch):
    (finished.root / lost).unlink()
    called = []
    monkeypatch.setattr("finlora.cluster.connect.prepare", lambda: called.append(1))
    assert call("train", "-c", config_file)[0] != 0  # ends at Ray, which is not to be had here
    assert called == [1]


def test_search_in_the_folder_of_a_run_is_refused(call, config_file, finished):
    code, out, err = call("tune", "-c", config_file, *TINY_SEARCH)
    assert (code, out) == (2, "")
    assert "holds something else than a search: choose another `name`" in " ".join(err.split())


def test_search_with_other_settings_or_another_driver_is_refused(call, config_file, make_config):
    search = SearchConfig(num_trials=3, bits=(16,), rank=(2, 4))
    folder = open_search(make_config("name=cli"), search)
    code, out, err = call("tune", "-c", config_file, *TINY_SEARCH, "search.rank=[2,8]")
    assert (code, out) == (2, "")
    assert "already holds a search with other settings (search.rank: [2, 4] there, [2, 8] here)" in " ".join(
        err.split()
    )
    with claim_run(RunFolder(folder.root)):
        code, _, err = call("tune", "-c", config_file, *TINY_SEARCH)
    assert code == 5
    assert "is in use by process " in " ".join(err.split())
