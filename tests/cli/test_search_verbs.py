"""Searches and reproductions on the command line: dry runs that start nothing, mistakes by message and exit code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def test_dry_search_lists_its_trials_and_starts_nothing(call, config_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = call("tune", "-c", config_file, "search.num_trials=3", "search.bits=[4]", "--dry-run")
    assert code == 0
    lines = out.splitlines()
    assert [line[:9] for line in lines[-3:]] == ["000-16bit", "001-4bit-", "002-4bit-"]
    assert "Dry run: nothing was started or written." in lines
    assert sorted(tmp_path.rglob("*")) == before


def test_ended_search_answers_from_disk_and_starts_no_ray(call, config_file, monkeypatch):
    from finlora.configfile import load_config
    from finlora.train.search.search_folder import TrialRecord, TrialState, open_search, write_record
    from finlora.train.search.space import SearchConfig, sample_trials

    config, search = load_config(config_file), SearchConfig(num_trials=2)
    folder = open_search(config, search)
    for trial in sample_trials(config, search):
        scores = {"accuracy": 0.5, "peak_memory_gib": 1.0, "hours": 0.1}
        write_record(
            folder,
            TrialRecord(
                trial=trial, state=TrialState.FINISHED, step=3, total_steps=3, held_out_loss=0.25, scores=scores
            ),
        )
    for name in ("prepare", "connect"):
        monkeypatch.setattr(f"finlora.cluster.connect.{name}", lambda **_: pytest.fail("Ray was started"))
    code, out, _ = call("tune", "-c", config_file, "search.num_trials=2")
    assert code == 0
    assert "All 2 trials have ended: nothing was started." in out
    assert f"Written: {folder.best}" in out


def test_faults_of_a_search_end_with_their_words(call, config_file):
    code, _, err = call("tune", "-c", config_file, "search.bits=[5]", "search.rank=[0]")
    assert code == 2
    assert "search.bits=[5]: expected some of 16, 8 and 4" in err
    assert "search.rank=[0]: expected integers of at least 1" in err


def test_dry_reproduction_says_why_what_cannot_run(call, tiny_base, tmp_path):
    code, out, _ = call(
        *("reproduce", "--configs", CONFIGS, "--output", tmp_path / "out", "--only", "llama-8b-*-fpb-*", "--dry-run"),
        *("--base-8b", tiny_base, f"data.dir={tmp_path / 'nothing'}"),
    )
    assert code == 0
    text = " ".join(out.split())
    assert "5 cannot run." in text
    assert "finlora prepare fpb" in text
    assert not (tmp_path / "out").exists()


def test_dry_reproduction_names_what_waits_and_says_a_reason_once(call, tiny_base, prepared_fpb, tmp_path):
    # Without the training split the row cannot be trained, and the 70B base is missing.
    shutil.copytree(prepared_fpb, tmp_path / "data")
    (tmp_path / "data" / "fpb" / "train.parquet").unlink()
    code, out, _ = call(
        *("reproduce", "--configs", CONFIGS, "--output", tmp_path / "out", "--only", "*-fpb-*", "--dry-run"),
        *("--base-8b", tiny_base, "--base-70b", tmp_path, f"data.dir={tmp_path / 'data'}"),
    )
    assert code == 0
    text = " ".join(out.split())
    assert "5 cannot run, 2 waits for its training, 1 to do." in text
    assert text.count("only the test split of fpb was prepared") == 1
    assert text.count("config.json") == 1


def test_reproduction_without_its_rows_is_refused(call, tmp_path):
    code, _, err = call("reproduce", "--configs", tmp_path, "--output", tmp_path / "out", "--dry-run")
    assert code == 2
    assert "lacks 24 of 24 rows" in err


def test_dry_reproduction_on_the_public_base_plans_its_rows_and_seeds(call, tiny_base, prepared_fpb, tmp_path):
    code, out, _ = call(
        *("reproduce", "--configs", CONFIGS, "--output", tmp_path / "out", "--only", "*-fpb-*", "--dry-run"),
        *("--base-135m", tiny_base, "--seeds", "0,1", f"data.dir={prepared_fpb}", "model.template=raw"),
    )
    assert code == 0
    text = " ".join(out.split())
    assert "15 to do." in text  # the base at 16, 8 and 4 bit; three adapters of two seeds, trained and scored
    assert "smollm2-135m-8bit-r8-fpb-seed1-evaluate" in text
    assert "llama" not in text


@pytest.mark.parametrize("seeds", ["a", "0,", "1,1", "-1", "0 1"])
def test_seeds_that_are_no_list_are_refused(call, tmp_path, seeds):
    code, _, err = call("reproduce", "--configs", CONFIGS, "--output", tmp_path, f"--seeds={seeds}", "--dry-run")
    assert code == 2
    assert "expected different whole numbers with commas between them, such as 0,1,2" in " ".join(err.split())


def test_reproduction_that_is_done_reports_and_starts_no_ray(call, tiny_base, prepared_fpb, tmp_path, monkeypatch):
    from made_results import make_evaluation

    from finlora.reproduce.outcomes import Outcome, StepState, write_outcome
    from finlora.reproduce.paper_rows import make_plan
    from finlora.results import append_result

    row, output = "llama-8b-base-fpb-evaluate", tmp_path / "out"
    (step,) = make_plan(CONFIGS, output, [f"data.dir={prepared_fpb}"], row, {"8b": str(tiny_base)})
    write_outcome(output, Outcome(name=row, key=step.key, state=StepState.DONE))
    append_result(output / "runs" / "llama-8b-base-fpb" / "results.jsonl", make_evaluation(variant="base"))
    monkeypatch.setattr("finlora.cluster.connect.connect", lambda **_: pytest.fail("Ray was started"))
    code, out, _ = call(
        *("reproduce", "--configs", CONFIGS, "--output", output, "--only", row, "--base-8b", tiny_base),
        *(f"data.dir={prepared_fpb}", "--minutes", "0"),
    )
    assert code == 0
    assert "1 done." in out
    assert (output / "report" / "report.html").is_file()
