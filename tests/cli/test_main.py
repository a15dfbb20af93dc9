"""Command line: fast help, mistakes by message and exit code, dry runs that write nothing, and complete verbs."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import typer.main
from made_results import make_evaluation

from finlora.cli.app import ORDER, OTHER_WORDS, say
from finlora.cli.main import app
from finlora.results import read_results

VERBS = sorted(command.callback.__name__.replace("_", "-") for command in app.registered_commands)
HEAVY = (
    "torch",
    "ray",
    "transformers",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "sklearn",
    "matplotlib",
    "numpy",
)


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom finlora.cli.main import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert not stop.code\n"
        f"heavy = [name for name in {HEAVY} if name in sys.modules]\nprint('HEAVY', heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("HEAVY []\n")
    assert sorted(ORDER) == VERBS
    rows = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("│") and line[2:3].isalpha()]
    assert rows == list(ORDER)


def test_mistake_in_a_setting_imports_nothing_slow_of_ray_or_deepspeed():
    code = (
        "import sys\nfrom finlora.cli.main import main\n"
        "try:\n    main(['train', 'lora.rank=0'])\nexcept SystemExit as stop:\n    assert stop.code == 2\n"
        "print('HEAVY', [name for name in ('ray', 'deepspeed', 'peft') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.endswith("HEAVY []\n")


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb_shows_an_example(call, verb):
    code, output, _ = call(verb, "--help")
    assert code == 0
    assert "Example" in output
    assert f"finlora {verb}" in output


def test_wrong_bits_and_rank_are_named_together_with_exit_code_2(call):
    code, output, error = call("train", "model.bits=3", "lora.rank=0")
    assert (code, output) == (2, "")
    assert "Config error: 2 settings are wrong" in error
    assert "model.bits=3: expected one of 16, 8, 4" in error
    assert "lora.rank=0: expected an integer of at least 1" in error


def test_missing_config_is_named_with_exit_code_2(call, tmp_path):
    code, _, error = call("train", "--config", tmp_path / "absent.yaml")
    assert code == 2
    assert "absent.yaml does not exist: see jobs/configs/" in error


def test_misspelt_setting_is_answered_with_its_neighbour(call):
    code, _, error = call("evaluate", "lora.rnak=4")
    assert code == 2
    assert "lora.rnak is not a setting: did you mean rank" in error


@pytest.mark.parametrize(
    ("word", "verb"), [("fine-tune", "train"), ("infer", "ask"), ("Deploy", "serve"), ("trian", "train")]
)
def test_wrong_verb_is_answered_with_the_one_that_is_meant(call, word, verb):
    code, _, error = call(word)
    assert code == 2
    assert f"No such command '{word}'. Did you mean '{verb}'" in " ".join(error.split())


def test_other_words_lead_to_verbs_and_are_none_themselves():
    assert set(OTHER_WORDS.values()) <= set(ORDER)
    assert not set(OTHER_WORDS) & set(ORDER)


def test_help_names_options_whole_on_a_narrow_terminal():
    command = [sys.executable, "-m", "finlora.cli.main", "serve", "--help"]
    done = subprocess.run(
        command, env={**os.environ, "COLUMNS": "30"}, capture_output=True, text=True, timeout=120, check=True
    )
    for option in ("--config", "--direct-port", "--dry-run"):
        assert option in done.stdout


def test_scores_are_shown_where_the_disk_does_not_take_them(call, config_file, monkeypatch):
    def refuse(_path, _result):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finlora.evaluate.evaluation.check_evaluation", lambda *_: "checked")
    monkeypatch.setattr("finlora.evaluate.evaluation.run_evaluation", lambda *_: [make_evaluation(0.863)])
    monkeypatch.setattr("finlora.results.append_result", refuse)
    code, out, error = call("evaluate", "-c", config_file, "--base")
    assert code == 5
    assert "86.3" in out
    assert "No space left on device" in error


def test_unprepared_task_has_exit_code_3(call, config_file):
    code, _, error = call("train", "--config", config_file, "--dry-run", "data.tasks=[fpb]")
    assert code == 3
    assert "Dataset error:" in error
    assert "Run `finlora prepare fpb" in error


def test_missing_base_has_exit_code_4(call, config_file, tmp_path):
    code, _, error = call("evaluate", "--config", config_file, "--base", f"model.base={tmp_path / 'absent'}")
    assert code == 4
    assert "Model error:" in error
    assert "neither a folder here nor a hub id" in error


def test_base_and_adapter_exclude_each_other(call, config_file, tmp_path):
    code, _, error = call("evaluate", "--config", config_file, "--base", "--adapter", tmp_path)
    assert code == 2
    assert "--base and --adapter exclude each other" in error


def test_missing_results_have_exit_code_7(call, tmp_path):
    code, _, error = call("report", tmp_path / "absent")
    assert code == 7
    assert "does not exist: give a results file" in error


OUTPUTS = {
    "prefetch": ("--check", "--output"),
    "new-task": ("/srv/letters.csv", "--output"),
    "prepare": ("synthetic", "--output"),
    "pretrain": ("--tasks", "synthetic", "--output"),
    "adopt": ("/srv/lora", "--base", "/srv/base", "--output"),
    "merge": ("--adapter", "/srv/adapter", "--output"),
    "key": ("desk", "--file"),
    "reproduce": ("--dry-run", "--output"),
    "report": ("/srv/runs", "--output"),
    "card": ("/srv/adapter", "--output"),
    "export": ("vllm", "/srv/adapter", "--output"),
    "feedback": ("/srv/corrections.csv", "--task", "letters", "--output"),
}


def test_each_verb_that_writes_is_among_those_whose_output_is_looked_at():
    commands = typer.main.get_command(app).commands
    assert {
        name
        for name, verb in commands.items()
        if {"--output", "--file"} & {word for p in verb.params for word in p.opts}
    } == set(OUTPUTS)


@pytest.mark.parametrize("verb", OUTPUTS)
def test_relative_output_in_a_ray_job_is_refused_with_a_message(call, tmp_path, monkeypatch, verb):
    """It would be in the job's temporary working directory, which Ray deletes."""
    copy = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    code, output, error = call(verb, *OUTPUTS[verb], "out/")
    assert (code, output) == (2, "")
    assert f"{OUTPUTS[verb][-1]} out is relative, but this Ray job runs in a temporary copy" in error
    assert f"give an absolute path on the cluster's storage, for example {OUTPUTS[verb][-1]} '~/finlora/out'" in error
    assert files_below(copy) == []


def test_merge_without_config_or_adapter_names_both(call, tmp_path):
    code, _, error = call("merge", "--output", tmp_path / "merged")
    assert code == 2
    assert "give --config YAML for that of its run, or --adapter FOLDER" in error


def test_merge_takes_the_adapter_of_its_config_as_evaluate_does(call, config_file, tmp_path):
    code, _, error = call("merge", "--config", config_file, "--output", tmp_path / "merged")
    assert code == 4
    assert str(tmp_path / "runs" / "cli" / "adapter") in error


def test_no_verb_shows_help(call):
    _, output, error = call()
    assert "Usage" in output + error
    assert "prepare" in output + error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--config", "{config}", "--dry-run"), "optimiser steps of 16 examples"),
        (("evaluate", "--config", "{config}", "--base", "--dry-run"), "Evaluating the base model on"),
        (("prepare", "synthetic_headline", "--output", "{folder}/data", "--dry-run"), "Dry run: nothing was written"),
    ],
    ids=["train", "evaluate", "prepare"],
)
def test_dry_run_shows_the_plan_and_writes_nothing(call, config_file, tmp_path, arguments, words):
    before = files_below(tmp_path)
    code, output, _ = call(*(argument.format(config=config_file, folder=tmp_path) for argument in arguments))
    assert code == 0
    assert words in output
    assert files_below(tmp_path) == before


def test_list_shows_every_task(call):
    from finlora.data.sets.catalog import TASKS

    code, output, _ = call("prepare", "list")
    assert code == 0
    assert [name for name in TASKS if name not in output] == []


def test_base_is_evaluated_and_reported(call, config_file, tmp_path):
    code, output, _ = call("evaluate", "--config", config_file, "--base", "data.max_test_examples=4")
    results = tmp_path / "runs" / "cli" / "results.jsonl"
    assert code == 0
    assert f"Appended to {results}" in output
    (row,) = read_results(results)
    assert (row.variant, row.num_examples, row.is_partial) == ("base", 4, True)
    code, output, _ = call("report", tmp_path / "runs")
    assert code == 0
    assert "synthetic_sentiment" in output


@pytest.mark.ray
def test_evaluation_as_a_ray_task_gives_the_same_scores(call, config_file, tmp_path, ray_instance):
    arguments = ("evaluate", "--config", config_file, "--base", "data.max_test_examples=4")
    assert call(*arguments)[0] == 0
    assert call(*arguments, "--ray")[0] == 0
    here, there = read_results(tmp_path / "runs" / "cli" / "results.jsonl")
    assert there.metrics == pytest.approx(here.metrics, rel=1e-6)  # a task has one thread: another order of sums
    assert there.counts == here.counts


def test_line_is_shown_as_it_is(capsys):
    say("held by job x: python jobs/train.py data.tasks=[fpb] " + "y" * 200)
    assert capsys.readouterr().out == "held by job x: python jobs/train.py data.tasks=[fpb] " + "y" * 200 + "\n"


def test_adapter_that_is_none_is_named_before_its_config_is_read(call, tmp_path, config_file):
    code, _, error = call("merge", "--adapter", tmp_path / "none", "--output", tmp_path / "merged")
    assert (code, f"adapter {tmp_path / 'none'} does not exist" in error) == (4, True)
    code, _, error = call("evaluate", "--config", config_file, "--adapter", config_file)
    assert (code, "config.yaml is a file: give the `adapter` folder of a finished run" in error) == (4, True)


def test_argument_that_is_no_text_is_named(call):
    code, _, error = call("train", os.fsdecode(b"name=\xff"))
    assert (code, error[:76]) == (2, "Config error: argument 2 is b'name=\\xff', which is not UTF-8: expected text ")
