"""A real search on Ray Tune: trials are Ray Train runs, one fails, ASHA stops one, and nothing is repeated.

Each trial takes about 15 s, nearly all of it the start of processes; so one search is made, then resumed and widened.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from finlora.configfile import load_config
from finlora.data.sets.prepared import read_prepared
from finlora.errors import NoRoomError, ResourceError, StoppedError
from finlora.results import read_results
from finlora.train.held_out import append_held_out, read_held_out
from finlora.train.search.search_folder import SearchFolder, TrialRecord, search_folder, write_record
from finlora.train.search.space import SearchConfig, sample_trials

pytestmark = pytest.mark.ray

# In order: the unchanged config; one at 4 bit whose alpha is so large that its gradients are clipped to almost zero, which ASHA
# stops; one at 8 bit, which fails because its base in the cache is damaged.
SEARCH = SearchConfig(
    num_trials=3, rank=(2,), bits=(4, 8), alpha=(1e8,), grace_share=0.5, reduction_factor=2, max_concurrent=1
)


def config_of(make_config, folder):
    return make_config(
        *("name=s", f"output_dir={folder}", "data.max_train_examples=24", "data.max_test_examples=16"),
        *(
            "train.max_steps=4",
            "train.global_batch_size=8",
            "train.cpus_per_worker=0.9",
            "model.bits=4",
            "optim.learning_rate=0.01",
        ),
        *("train.log_every_steps=1", "train.max_failures=0", "max_wait_s=60"),
    )


@pytest.fixture(scope="module")
def searched(ray_instance, tiny_base, prepared_synthetic, tmp_path_factory):
    """Config, records and lines of a search."""
    from finlora.model.base import load_base, quiet_bitsandbytes
    from finlora.train.search.search import run_search

    folder = tmp_path_factory.mktemp("search")

    def make(*overrides):
        own = [f"model.base={tiny_base}", "model.compute_dtype=float32", f"data.dir={prepared_synthetic}"]
        own += ["data.tasks=[synthetic_sentiment]", "train.device=cpu", "train.precision=fp32", "eval.device=cpu"]
        return load_config(None, [*own, "eval.bits=null", *overrides])

    config, lines, ended = config_of(make, folder), [], []
    model = dataclasses.replace(config.model, cache=str(folder / "cache"))
    config = dataclasses.replace(config, model=model)
    with quiet_bitsandbytes():
        load_base(model, 8, torch.device("cpu"), config.seed)
    (damaged,) = (folder / "cache").glob("*-8bit-*/layer-1.safetensors")
    damaged.write_bytes(b"")
    records = run_search(config, SEARCH, lines.append, ended.append)
    return config, records, lines, ended


def test_trial_is_a_whole_run_scored_on_held_out_examples(searched):
    config, (first, *_), _, _ = searched
    assert (first.state, first.step, first.total_steps) == ("finished", 4, 4)
    assert set(first.scores) == {"accuracy", "weighted_f1", "strict_accuracy", "peak_memory_gib", "hours"}
    assert 0.1 < first.scores["peak_memory_gib"] < 8
    assert 0 < first.scores["hours"] * 3600 < first.seconds
    run = search_folder(config).run_of(first.trial)
    training, evaluation = read_results(run.results)
    assert (training.kind, evaluation.kind) == ("training", "evaluation")
    assert evaluation.metrics["accuracy"] == first.scores["accuracy"]
    held = read_prepared(search_folder(config).data, "synthetic_sentiment", "test")
    assert evaluation.data_hash == held.hash
    assert [report["step"] for report in read_held_out(run)] == [2, 3, 4]
    assert read_held_out(run)[-1]["held_out_loss"] == first.held_out_loss
    assert (run.adapter / "finlora.yaml").is_file()


def test_pruned_and_failed_trials_are_recorded_with_their_cause_while_the_search_goes_on(searched):
    _, records, lines, ended = searched
    assert [(record.trial.bits, record.state) for record in records] == [(4, "finished"), (4, "pruned"), (8, "failed")]
    assert ended == records
    assert records[1].cause == "stopped by ASHA at step 2"
    assert records[1].step in (2, 3, 4)  # its workers continue until they are killed
    assert records[1].held_out_loss > records[0].held_out_loss
    assert records[2].cause.startswith("Model: ")
    assert "layer-1.safetensors is missing or not of" in records[2].cause
    assert "3 trials of 4 steps, at most 1 at once; ASHA looks after steps 2." in lines


def test_search_frees_all_it_held(searched):
    """Ray Train's clean-up after a trial that ASHA stopped fails on a machine with several clusters, as this one may be."""
    import ray

    ended = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"] and time.monotonic() < ended:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def test_trials_share_the_quantised_base(searched):
    config, _, _, _ = searched
    assert len(list(Path(config.model.cache).glob("*-4bit-*/cache.json"))) == 1


def test_results_of_trials_do_not_pass_for_those_of_runs(searched):
    """They are scores on held-out training examples: a report of all runs omits them, a report of the search shows them."""
    from finlora.errors import ResultError

    config, _, _, _ = searched
    root = search_folder(config).root
    with pytest.raises(ResultError, match="holds no results"):
        read_results(root.parent)
    assert len(read_results(root)) == 2


def test_search_that_has_ended_starts_nothing(searched):
    from finlora.train.search.search import run_search

    config, records, _, _ = searched
    lines = []
    assert run_search(config, SEARCH, lines.append) == records
    assert lines == ["3 of 3 trials have ended already: 0 to go."]


def test_trial_killed_after_training_is_only_scored_again(searched):
    """As if the driver had crashed between training and the trial's record; the first trial's training is kept."""
    from finlora.train.search.search import run_search

    config, (first, *_), _, _ = searched
    folder = search_folder(config)
    run = folder.run_of(first.trial)
    (run.root / "trial.json").unlink()
    before = (run.adapter / "adapter_model.safetensors").stat().st_mtime_ns
    again, *_ = run_search(config, SEARCH, lambda _line: None)
    assert (again.state, again.scores) == (first.state, first.scores)
    assert (run.adapter / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert [result.kind for result in read_results(run.results)] == ["training", "evaluation", "evaluation"]


def test_failed_trials_run_again_only_when_asked(searched):
    """The base in the cache is repaired, so the failure and its message disappear."""
    from finlora.train.search.search import run_search

    config, records, _, _ = searched
    (mark,) = Path(config.model.cache).glob("*-8bit-*/cache.json")
    shutil.rmtree(mark.parent)
    lines = []
    again = run_search(config, dataclasses.replace(SEARCH, retry_failed=True), lines.append)
    assert "2 of 3 trials have ended already: 1 to go." in lines
    assert [record.state for record in again] == ["finished", "pruned", "pruned"]
    assert again[1] == records[1]
    assert again[2].cause == "stopped by ASHA at step 2"


def test_stop_request_starts_no_trial(searched, monkeypatch):
    from finlora.train.search import search as module

    config, _, _, _ = searched
    folder = search_folder(config)

    def ask(*_arguments):
        folder.stop.write_text("SIGINT")

    monkeypatch.setattr(module, "wait_for_room", ask)
    wider = dataclasses.replace(SEARCH, num_trials=4)
    with pytest.raises(StoppedError, match=r"Stopped by SIGINT with 3 of 4 trials ended: the same command") as caught:
        module.run_search(config, wider, lambda _line: None)
    assert caught.value.exit_code == 130


def test_search_that_finds_no_room_says_who_holds_it(searched):
    import ray

    from finlora.train.search.search import run_search

    @ray.remote(num_cpus=1.5)
    class Holder:
        def ready(self):
            return True

    holder = Holder.remote()
    ray.get(holder.ready.remote())
    config, _, _, _ = searched
    lines = []
    try:
        with pytest.raises(NoRoomError, match=r"0\.9 CPU wanted.* held: 1\.5 by .*Holder"):
            run_search(
                dataclasses.replace(config, max_wait_s=0.0), dataclasses.replace(SEARCH, num_trials=4), lines.append
            )
    finally:
        ray.kill(holder)


def test_more_than_the_cluster_has_is_refused_at_once(searched):
    from finlora.train.search.search import run_search

    config, _, _, _ = searched
    greedy = dataclasses.replace(config, name="g", train=dataclasses.replace(config.train, cpus_per_worker=999.0))
    with pytest.raises(ResourceError, match="asks for 999 CPU"):
        run_search(greedy, SEARCH, lambda _line: None)
    assert not search_folder(greedy).root.exists()


def test_resumed_asha_knows_what_earlier_trials_reported(make_config, tmp_path):
    """Ray Tune's restore loses ASHA's rungs; these come from the trials' folders."""
    from finlora.train.search.asha import ResumedAsha

    folder = SearchFolder(tmp_path)
    trials = sample_trials(make_config(), SearchConfig(num_trials=5))
    done = []
    for trial, loss in zip(trials[:3], (0.2, 0.4, 0.6), strict=True):
        record = TrialRecord(trial=trial, state="finished", step=10, total_steps=10, held_out_loss=loss)
        write_record(folder, record)
        append_held_out(folder.run_of(trial), 5, loss)
        done.append(record)

    class Running:
        def __init__(self, name):
            self.trial_id, self.config = name, {"trial": name}

    def decide(name, loss):
        asha = ResumedAsha(folder, 2, 10, 5, done)
        trial = Running(name)
        (folder.trials / name).mkdir(exist_ok=True)
        asha.on_trial_add(None, trial)
        return asha.on_trial_result(None, trial, {"step": 5, "held_out_loss": loss})

    assert decide(trials[3].name, 0.39) == "CONTINUE"
    assert not (folder.trials / trials[3].name / "pruned").exists()
    assert decide(trials[4].name, 0.41) == "STOP"
    assert (folder.trials / trials[4].name / "pruned").read_text() == "5"
    assert decide(trials[0].name, 9.9) == "CONTINUE"  # the unchanged config continues to its end
    assert json.loads((folder.trials / trials[0].name / "trial.json").read_text())["state"] == "finished"
