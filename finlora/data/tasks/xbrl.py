"""XBRL tags and values of filings: free-text answers quoted from a context of thousands of tokens.

The published rows hold their prompt, kept verbatim with its faults: a leading quote, tags cut to `</>`, texts cut at 100
characters, one shot before the question. The paper's split cannot be rebuilt. This split separates filings over both
tasks: the files of 2025-03-10 are the test, and the rows of 2025-03-13 whose filing is in neither of them the training
examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from finlora.data.example import Example, Splits
from finlora.data.prompts import xbrl_prompt
from finlora.data.question import Form
from finlora.data.raw.hub_rows import load_hub_rows
from finlora.data.raw.rows import Row, find_file, read_jsonl
from finlora.data.task import Published, Request, published_task
from finlora.errors import DatasetError

HUB_ID = "wangd12/XBRL_analysis"
FORM = Form(render=xbrl_prompt, choices=(), about="question")
_COLUMNS = ("context", "target", "doc_path")
_KINDS = {"xbrl_tags": "xbrl_tags", "xbrl_values": "value"}
_TEST_DATE, _TRAIN_DATE = "20250310", "20250313"
# The one-shot example's answer identifies the kind where one table holds both.
_SHOTS = {"xbrl_tags": "Example answer: us-gaap:AnExampleTagName", "xbrl_values": "Example answer: 2540000000"}


def read_xbrl_tags(request: Request) -> Splits:
    """Read questions for the US GAAP tag of a line item: 89 / 115."""
    return _read("xbrl_tags", request)


def read_xbrl_values(request: Request) -> Splits:
    """Read questions for a reported number: 95 / 102."""
    return _read("xbrl_values", request)


def _read(task: str, request: Request) -> Splits:
    if request.source is None:
        return _read_hub(task)
    if request.source.is_file():
        raise DatasetError(f"{request.source} is one file: expected the folder of both tasks' files of both dates.")
    test_pools = {name: _read_pool(request.source, name, _TEST_DATE) for name in _KINDS}
    test_filings = {row.text("doc_path") for pool in test_pools.values() for row in pool}
    if request.splits == "test":
        pool, train = [], []
    else:
        pool = _read_pool(request.source, task, _TRAIN_DATE)
        train = [row for row in pool if row.text("doc_path") not in test_filings]
    test = test_pools[task]
    notes = [
        f"Test: the files of {_TEST_DATE}, {len(test_filings)} filings over tags and values together. Counts "
        "differ from the paper's, whose split cannot be rebuilt.",
        f"Left out of train: {len(pool) - len(train)} of {len(pool)} rows of {_TRAIN_DATE}: their filing tests.",
    ]
    absent = sum(row.text("target") not in row.text("context") for row in (*train, *test))
    if absent:
        notes.append(f"{absent} answers do not stand in their context.")
    return Splits(train=_build(task, "train", train), test=_build(task, "test", test), notes=tuple(notes))


def _read_pool(folder: Path, task: str, date: str) -> list[Row]:
    path = find_file(folder, (f"xbrl_{_KINDS[task]}_test.{date}.jsonl",), task)
    return read_jsonl(path, _COLUMNS)


def _read_hub(task: str) -> Splits:
    parts: dict[str, tuple[Example, ...]] = {}
    notes = []
    for split in ("train", "test"):
        rows = load_hub_rows(HUB_ID, split, _COLUMNS)
        chosen = [row for row in rows if _SHOTS[task] in row.text("context")]
        if not chosen:
            raise DatasetError(
                f"{HUB_ID} (split {split}) holds {len(rows)} rows and none with the one shot of {task}. "
                "Pass the published jsonl files with --source FOLDER."
            )
        notes.append(f"{split}: {len(rows) - len(chosen)} of {len(rows)} rows of the hub are of other XBRL tasks.")
        parts[split] = _build(task, split, chosen)
    return Splits(train=parts["train"], test=parts["test"], notes=tuple(notes))


def _build(task: str, split: str, rows: Sequence[Row]) -> tuple[Example, ...]:
    return tuple(
        Example(
            id=f"{task}-{split}-{number}",
            task=task,
            prompt=row.text("context"),
            answer=row.text("target"),
            label=row.text("target"),
            choices=(),
            source=row.source,
            group=row.text("doc_path"),
        )
        for number, row in enumerate(rows)
    )


TASKS = (
    published_task(
        "xbrl_tags",
        "XBRL tag of a line item",
        "xbrl",
        HUB_ID,
        order=30,
        licence="MIT (by FinLoRA's README)",
        form=FORM,
        read=read_xbrl_tags,
        published=(
            Published(train=89, test=115, train_hash="0b5df95f7b6c9e81", test_hash="275612871ded4175", is_of_hub=False),
        ),
    ),
    published_task(
        "xbrl_values",
        "XBRL reported number",
        "xbrl",
        HUB_ID,
        order=31,
        licence="MIT (by FinLoRA's README)",
        form=FORM,
        read=read_xbrl_values,
        published=(
            Published(train=95, test=102, train_hash="bec65f853fc5846d", test_hash="f7e84f7e6be2d75a", is_of_hub=False),
        ),
    ),
)
