"""Prepared sets: round trip, refusal, damage; and the verb on top of them."""

from __future__ import annotations

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finlora.data.example import Example, Splits
from finlora.data.sets.catalog import TASKS, task_named
from finlora.data.sets.prepare import prepare_task
from finlora.data.sets.prepared import examples_hash, read_prepared, write_prepared
from finlora.errors import DatasetError


def example(number, split="train", answer="neutral", **changes):
    item = Example(
        id=f"fpb-{split}-{number}",
        task="fpb",
        prompt=f"Instruction: ?\nInput: Ünit {number} .\nAnswer: ",
        answer=answer,
        label=answer,
        choices=("negative", "neutral", "positive"),
        source=f"x.txt:{number}",
        group=f"Ünit {number} .",
    )
    return dataclasses.replace(item, **changes)


SPLITS = Splits(
    train=(example(1), example(2), example(2, answer="neutral", id="fpb-train-3")),
    test=(example(2, "test"), example(9, "test", "positive")),
    notes=("Invented.",),
)


def write(output, splits=SPLITS, *, overwrite=False, dry_run=False, variant="as_published"):
    return write_prepared(
        TASKS["fpb"],
        splits,
        output,
        variant=variant,
        source="invented",
        version="1",
        overwrite=overwrite,
        dry_run=dry_run,
    )


def test_round_trip_keeps_examples_and_facts(tmp_path):
    report = write(tmp_path)
    read = read_prepared(tmp_path, "fpb", "train")
    assert read.examples == SPLITS.train
    assert read.hash == report.hashes["train"] == examples_hash(SPLITS.train)
    assert (read.licence, read.source, read.finlora_version) == ("CC BY-NC-SA 3.0", "invented", "1")
    assert read.notes == ("Invented.",)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fpb"]


def test_report_counts_duplicates_leaks_and_lengths(tmp_path):
    report = write(tmp_path)
    assert report.counts == {"train": 3, "test": 2}
    assert report.duplicates == {"train": 1, "test": 0}
    assert (report.group_leaks, report.prompt_leaks) == (1, 1)
    assert report.labels["test"] == {"neutral": 1, "positive": 1}
    assert report.prompt_chars["test"] == (len(SPLITS.test[0].prompt), len(SPLITS.test[0].prompt))


def test_same_set_is_kept_and_another_refused(tmp_path):
    assert write(tmp_path).is_written
    assert not write(tmp_path).is_written
    other = dataclasses.replace(SPLITS, train=SPLITS.train[:1])
    with pytest.raises(DatasetError, match=r"holds a different set .* pass --overwrite"):
        write(tmp_path, other)
    assert len(read_prepared(tmp_path, "fpb", "train").examples) == 3
    assert write(tmp_path, other, overwrite=True).is_written
    assert len(read_prepared(tmp_path, "fpb", "train").examples) == 1


def test_dry_run_writes_nothing(tmp_path):
    assert not write(tmp_path / "new", dry_run=True).is_written
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_old_set(tmp_path, monkeypatch):
    write(tmp_path)
    monkeypatch.setattr(pq, "write_table", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(DatasetError, match="disk full"):
        write(tmp_path, dataclasses.replace(SPLITS, train=SPLITS.train[:1]), overwrite=True)
    assert read_prepared(tmp_path, "fpb", "train").examples == SPLITS.train
    assert [path.name for path in tmp_path.iterdir()] == ["fpb"]


def test_missing_set_says_to_prepare_it(tmp_path):
    with pytest.raises(DatasetError, match=r"not found\. Run `finlora prepare fpb --output"):
        read_prepared(tmp_path, "fpb", "test")
    write(tmp_path, dataclasses.replace(SPLITS, train=()))
    with pytest.raises(DatasetError, match="only the test split of fpb was prepared"):
        read_prepared(tmp_path, "fpb", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match=r"data\.dir=.*file is a file: give the folder that `finlora prepare` wrote"):
        read_prepared(tmp_path / "file", "fpb", "train")


def test_cut_short_file_is_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "fpb" / "test.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match="not readable Parquet, perhaps truncated"):
        read_prepared(tmp_path, "fpb", "test")


@pytest.mark.parametrize("column", ["answer", "label", "prompt"])
def test_changed_example_is_refused(tmp_path, column):
    write(tmp_path)
    path = tmp_path / "fpb" / "test.parquet"
    table = pq.read_table(path)
    index = table.schema.get_field_index(column)
    changed = pa.array(["positive"] * len(table), pa.string())
    pq.write_table(table.set_column(index, table.schema.field(index), changed), path)
    with pytest.raises(DatasetError, match="was changed after it was prepared"):
        read_prepared(tmp_path, "fpb", "test")


def test_foreign_and_misplaced_files_are_refused(tmp_path):
    write(tmp_path)
    path = tmp_path / "fpb" / "test.parquet"
    path.write_bytes((tmp_path / "fpb" / "train.parquet").read_bytes())
    with pytest.raises(DatasetError, match="holds the train split of fpb: expected test of fpb"):
        read_prepared(tmp_path, "fpb", "test")
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(DatasetError, match="was not written by FinLoRA"):
        read_prepared(tmp_path, "fpb", "test")


def test_faulty_examples_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="has no test example"):
        write(tmp_path, dataclasses.replace(SPLITS, test=()))
    with pytest.raises(DatasetError, match=r"x\.txt:4: fpb-test-4 answers 'odd', expected one of"):
        write(tmp_path, dataclasses.replace(SPLITS, test=(example(4, "test", "odd"),)))


def test_unknown_task_lists_near_names():
    with pytest.raises(DatasetError, match=r"'fpbb' is not a task: did you mean fpb"):
        task_named("fpbb")


@pytest.mark.parametrize("name", TASKS)
def test_catalog_is_consistent(name):
    task = TASKS[name]
    assert task.name == name
    assert task.variants[0] == "as_published"
    assert task.is_free_text == (not task.choices) or name == "synthetic"


def test_prepare_checks_variant_and_source(tmp_path):
    with pytest.raises(DatasetError, match="fpb has no variant 'corrected': expected as_published"):
        prepare_task("fpb", tmp_path, tmp_path, "corrected", "all", overwrite=False, dry_run=False)
    with pytest.raises(DatasetError, match="is generated and reads no files"):
        prepare_task("synthetic", tmp_path, tmp_path, None, "all", overwrite=False, dry_run=False)


def test_prepare_writes_the_test_alone(tmp_path):
    report = prepare_task("synthetic_ner", None, tmp_path, None, "test", overwrite=False, dry_run=False)
    assert report.counts == {"test": 600}
    assert report.notes[-1] == "The training split was left out on request."
    assert len(read_prepared(tmp_path, "synthetic_ner", "test").examples) == 600


@pytest.mark.shared_data
def test_prepare_reports_known_leaks_of_fpb(shared_data, tmp_path):
    report = prepare_task("fpb", shared_data / "fpb", tmp_path, None, "all", overwrite=False, dry_run=False)
    assert report.counts == {"train": 3634, "test": 1212}
    assert report.duplicates["test"] == 2
    assert report.group_leaks == 5
