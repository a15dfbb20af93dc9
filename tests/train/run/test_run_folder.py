"""Folder of a run: its owner, the settings that may change on a resume, and its files read back."""

from __future__ import annotations

import dataclasses
import errno
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from small_disk import small_files

from finlora.configfile import load_config
from finlora.errors import ConfigError, DatasetError, ResourceError
from finlora.model.base import load_base
from finlora.model.contract import read_contract
from finlora.model.lora import attach_lora
from finlora.optim.traffic import Wire
from finlora.train.run.checkpoint import CheckpointInfo, save_checkpoint
from finlora.train.run.progress import append_progress, read_progress
from finlora.train.run.run_folder import (
    RunFolder,
    claim_run,
    describe_run,
    explain_full_disk,
    hash_run,
    load_training_set,
    open_run,
    resolve_paths,
)
from finlora.train.run.summary import export_adapter
from finlora.train.steps.loop import Progress


def progress(step, loss=0.5):
    return Progress(
        step=step,
        total_steps=10,
        epoch=step / 4,
        loss=loss,
        learning_rate=1e-4,
        tokens_per_second=100.0,
        examples_per_second=2.0,
        memory_gib=1.5,
        seconds_left=3.0,
    )


def test_run_folder_keeps_the_config_that_reruns_it(make_config):
    config = make_config("name=first", "train.epochs=2")
    folder = open_run(config)
    assert load_config(folder.config) == config
    assert open_run(config) == folder


def test_run_of_another_version_is_refused_with_its_file(make_config):
    folder = open_run(make_config())
    with folder.config.open("a", encoding="utf-8") as stream:
        stream.write("of_a_newer_version: 1\n")
    with pytest.raises(
        ConfigError, match=r"config.yaml belongs to a run and cannot be read by this version \(of_a_newer"
    ):
        open_run(make_config())


def test_same_name_with_other_settings_is_refused_by_what_differs(make_config):
    open_run(make_config())
    words = r"already holds a run with other settings \(seed: 42 there, 7 here; lora.rank: 4 there, 8 here\).*another `name`"
    with pytest.raises(ConfigError, match=words):
        open_run(make_config("seed=7", "lora.rank=8"))
    assert load_config(RunFolder(open_run(make_config()).root).config).lora.rank == 4


@pytest.mark.parametrize(
    "override",
    [
        "train.max_failures=9",
        "train.keep_checkpoints=7",
        "train.checkpoint_every_steps=3",
        "train.log_every_steps=1",
        "train.cpus_per_worker=0.5",
        "train.gpus_per_worker=0.5",
        "train.memory_gib=9",
        "train.recompute=layer",
        "eval.batch_size=3",
        "data.max_test_examples=3",
        "tracking.mlflow=sqlite:////m.db",
    ],
)
def test_settings_that_change_no_number_may_change_on_a_resume(make_config, override):
    config, changed = make_config(), make_config(override)
    open_run(config)
    folder = open_run(changed)
    assert load_config(folder.config) == changed
    assert hash_run(changed, {"t": "1"}) == hash_run(config, {"t": "1"})


@pytest.mark.parametrize(
    "override",
    ["seed=1", "lora.dropout=0.2", "model.bits=8", "train.num_workers=2", "train.epochs=2", "optim.learning_rate=0.5"],
)
def test_run_hash_changes_with_what_is_computed(make_config, override):
    assert hash_run(make_config(override), {"t": "1"}) != hash_run(make_config(), {"t": "1"})
    assert hash_run(make_config(), {"t": "2"}) != hash_run(make_config(), {"t": "1"})


def test_local_paths_become_absolute_and_a_hub_id_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    resolved = resolve_paths(load_config(None, ["model.base=base", "data.dir=data", "output_dir=~/runs"]))
    assert (resolved.model.base, resolved.data.dir) == (str(tmp_path / "base"), str(tmp_path / "data"))
    assert resolved.output_dir.startswith("/")
    assert "~" not in resolved.output_dir
    stores = {
        "sqlite:///m.db": f"sqlite:///{tmp_path}/m.db",
        "sqlite:////x/m.db": "sqlite:////x/m.db",
        "http://h:5000": "http://h:5000",
    }
    for named, store in stores.items():
        assert resolve_paths(load_config(None, [f"tracking.mlflow={named}"])).tracking.mlflow == store
    hub = resolve_paths(load_config(None, ["model.base=owner/name"]))
    assert (hub.model.base, hub.model.tokenizer) == ("owner/name", None)


def test_relative_paths_in_a_jobs_copy_are_refused_with_a_message(tmp_path, monkeypatch):
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "pkg"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"3 settings are wrong") as caught:
        resolve_paths(load_config(None, ["output_dir=runs", "data.dir=data", "tracking.mlflow=sqlite:///m.db"]))
    assert [fault.partition(",")[0] for fault in caught.value.faults] == [
        "output_dir=runs is relative",
        "data.dir=data is relative",
        "tracking.mlflow=sqlite:///m.db is relative",
    ]
    assert "temporary copy of your folder" in caught.value.faults[0]
    assert resolve_paths(load_config(None, ["output_dir=/x/runs", "data.dir=~/data"])).output_dir == "/x/runs"


def test_output_in_a_jobs_copy_is_refused_even_where_the_folder_came_along(tmp_path, monkeypatch):
    """Data that came with the copy can be read; what is written there is deleted with it."""
    copy = tmp_path / "runtime_resources" / "pkg"
    (copy / "runs").mkdir(parents=True)
    (copy / "data").mkdir()
    monkeypatch.chdir(copy)
    with pytest.raises(ConfigError, match=r"output_dir=runs is relative") as caught:
        resolve_paths(load_config(None, ["output_dir=runs", "data.dir=data"]))
    assert len(caught.value.faults) == 1


def test_progress_reads_back_in_step_order_with_the_later_of_two(tmp_path):
    folder = RunFolder(tmp_path)
    assert read_progress(folder) == []
    for step, loss in [(1, 0.9), (2, 0.8), (3, 0.7), (2, 0.85), (3, 0.75)]:
        append_progress(folder, progress(step, loss))
    assert [(record.step, record.loss) for record in read_progress(folder)] == [(1, 0.9), (2, 0.85), (3, 0.75)]
    assert read_progress(folder)[0] == progress(1, 0.9)
    assert len(folder.progress.read_text().splitlines()) == 5


def test_line_cut_by_a_crash_is_not_a_record(tmp_path):
    folder = RunFolder(tmp_path)
    append_progress(folder, progress(1))
    with folder.progress.open("a") as stream:
        stream.write(json.dumps(dataclasses.asdict(progress(2)))[:40])
    assert [record.step for record in read_progress(folder)] == [1]
    append_progress(folder, progress(2))
    assert [record.step for record in read_progress(folder)] == [1, 2]


def test_training_set_is_encoded_with_its_hash(make_config, prepared_synthetic):
    from finlora.data.sets.prepared import read_prepared

    split = read_prepared(prepared_synthetic, "synthetic_sentiment", "train")
    training_set = load_training_set(make_config())
    assert len(training_set.encoded) == len(split.examples)
    assert training_set.hashes == {"synthetic_sentiment": split.hash}
    assert training_set.num_skipped == 0


def test_limited_training_set_is_sampled_by_the_seed(make_config):
    whole = load_training_set(make_config()).encoded
    some = load_training_set(make_config("data.max_train_examples=20")).encoded
    assert len(some) == 20
    assert some != whole[:20]
    assert set(some) <= set(whole)
    assert load_training_set(make_config("data.max_train_examples=20")).encoded == some
    assert load_training_set(make_config("data.max_train_examples=20", "seed=1")).encoded != some


def test_two_tasks_train_together(make_config):
    training_set = load_training_set(make_config("data.tasks=[synthetic_sentiment, synthetic_xbrl]"))
    assert list(training_set.hashes) == ["synthetic_sentiment", "synthetic_xbrl"]
    assert len(training_set.encoded) > len(load_training_set(make_config()).encoded)


def test_skipped_examples_are_counted(make_config):
    lengths = sorted(item.num_tokens for item in load_training_set(make_config()).encoded)
    limit = lengths[len(lengths) // 2]
    training_set = load_training_set(make_config(f"model.max_seq_len={limit}", "data.too_long=skip"))
    assert training_set.num_skipped == sum(length > limit for length in lengths) > 0
    assert len(training_set.encoded) == len(lengths) - training_set.num_skipped


def test_task_that_is_not_prepared_is_refused_with_a_message(make_config):
    with pytest.raises(DatasetError, match=r"fpb/train.parquet: not found. Run `finlora prepare fpb --output"):
        load_training_set(make_config("data.tasks=[fpb]"))


def test_prompts_have_one_date_on_any_day_and_it_goes_into_the_contract(make_config, dated_base, pretend_day):
    """On another day the run is the same one, so it resumes; another date makes another run."""
    sets = []
    for day in ("2026-11-30", "2026-12-01"):
        pretend_day(day)
        config = make_config(f"model.base={dated_base}", "model.template=chat")
        sets.append(load_training_set(config))
        base = load_base(config.model, 16, torch.device("cpu"), 0)
    assert sets[0] == sets[1]
    assert sets[0].template_date == "2024-07-26"
    assert "chat template: 2024-07-26 on every day (model.template_date)\n" in describe_run(config, sets[0])
    other = make_config(f"model.base={dated_base}", "model.template=chat", "model.template_date=2025-03-09")
    found = load_training_set(other)
    assert (found.template_date, other.model.template_date) == ("2025-03-09", "2025-03-09")
    assert found.encoded[0].prompt_ids != sets[0].encoded[0].prompt_ids
    assert sets[0].name_inputs("ab") == {**sets[0].hashes, "base": "ab", "template date": "2024-07-26"}
    with pytest.raises(ConfigError, match=r"model.template_date: None there, 2025-03-09 here"):
        (open_run(config), open_run(other))
    folder = open_run(config)
    append_progress(folder, progress(10))
    net = attach_lora(base.model, config.lora, config.model.base, 1)
    export_adapter(config, folder, base, net, sets[1])
    assert read_contract(folder.adapter).template_date == "2024-07-26"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["model.template_date=yesterday", "model.template=chat"],
            r"template_date=yesterday: expected a date such as 2024-07-26",
        ),
        (["model.template_date=2024-07-26"], r"template_date=2024-07-26 has no effect with template=raw"),
    ],
)
def test_date_that_is_none_is_refused(make_config, settings, words):
    with pytest.raises(ConfigError, match=words):
        make_config(*settings)


def test_answer_of_which_no_token_is_made_is_refused(make_config, monkeypatch):
    monkeypatch.setattr("finlora.data.encode.encode_answer", lambda _answer, _tokenizer, _template: (1,))
    with pytest.raises(DatasetError, match=r"has the answer '\w+', which has no token in this tokenizer"):
        load_training_set(make_config())


def test_description_counts_examples_and_steps(make_config):
    config = make_config("data.max_train_examples=21", "train.global_batch_size=8", "train.epochs=2")
    text = describe_run(config, load_training_set(config))
    assert "21 examples (0 skipped)" in text
    assert "6 optimiser steps of 8 examples: 1 workers, packed" in text
    padded = dataclasses.replace(config, train=dataclasses.replace(config.train, packing=False))
    assert "1 workers, micro-batches of 4" in describe_run(padded, load_training_set(padded))
    limited = dataclasses.replace(config, train=dataclasses.replace(config.train, max_steps=4))
    assert "4 optimiser steps" in describe_run(limited, load_training_set(limited))


def test_second_driver_is_kept_out_of_a_run(make_config):
    folder = open_run(make_config())
    words = rf"is in use by process {os.getpid()} on .*: wait for that run to end or to stop, or choose another `name`"
    with claim_run(folder), pytest.raises(ResourceError, match=words), claim_run(folder):
        pytest.fail("the folder was given twice")
    with claim_run(folder):
        assert (folder.root / "lock").read_text().startswith("process ")


@pytest.mark.parametrize("kind", ["text", "torch", "safetensors", "checkpoint"])
def test_write_that_did_not_fit_is_explained_whoever_wrote(kind, tmp_path):
    tensors = {"a": torch.ones(100_000)}
    parameters = {"a": torch.nn.Parameter(tensors["a"])}
    info = CheckpointInfo(step=1, world_size=1, run_hash="abc")
    writes = {
        "text": lambda: (tmp_path / "file").write_text("x" * 100_000),
        "torch": lambda: torch.save(tensors, tmp_path / "file"),
        "safetensors": lambda: save_file(tensors, str(tmp_path / "file")),
        "checkpoint": lambda: save_checkpoint(tmp_path / "c", 0, info, parameters, {"state": 1}, Wire()),
    }
    with pytest.raises(Exception) as caught, small_files(8192):  # noqa: PT011 - each library raises a kind of its own
        writes[kind]()
    said = explain_full_disk(caught.value, RunFolder(tmp_path))
    assert isinstance(said, ResourceError)
    assert f"free disk space below {tmp_path} and in the temporary folder" in str(said)
    assert not (tmp_path / "c" / "manifest-0.json").exists()


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    folder = RunFolder(tmp_path)
    assert explain_full_disk(OSError(errno.ENOSPC, "full"), folder) is not None
    assert explain_full_disk(FileNotFoundError(errno.ENOENT, "missing"), folder) is None
    assert explain_full_disk(RuntimeError("shapes differ"), folder) is None
