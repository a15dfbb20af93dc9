"""Searches and reproductions on the command line: dry runs that start nothing, mistakes by words and exit code."""

from __future__ import annotations

import shutil
from pathlib import Path

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def test_dry_search_lists_its_trials_and_starts_nothing(call, config_file, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    code, out, _ = call("tune", "-c", config_file, "search.num_trials=3", "search.bits=[4]", "--dry-run")
    assert code == 0
    lines = out.splitlines()
    assert [line[:9] for line in lines[-3:]] == ["000-16bit", "001-4bit-", "002-4bit-"]
    assert "Dry run: nothing was started or written." in lines
    assert sorted(tmp_path.rglob("*")) == before


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
    # The training split is away, so that what is to be scored cannot be trained; of the 70B base nothing is here.
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
