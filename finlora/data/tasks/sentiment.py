"""Sentiment of news and posts: FPB, FiQA (two splits), TFNS and NWGI.

The three sets number their labels differently: FPB 0 negative 1 neutral 2 positive, TFNS 0 negative 1 positive
2 neutral; FiQA's label is folded from its score, because its label column disagrees with the score on some rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from finlora.data.example import Example, Splits
from finlora.data.prompts import SENTIMENTS, SEVEN_SENTIMENTS, sentiment_prompt, seven_sentiment_prompt
from finlora.data.question import Form
from finlora.data.raw.arrow import read_arrow
from finlora.data.raw.hub_rows import load_hub_rows
from finlora.data.raw.rows import Row, find_file, read_csv, read_jsonl, read_lines, shorten
from finlora.data.task import Published, Request, published_task
from finlora.errors import DatasetError, counted

FPB_HUB_ID = "takala/financial_phrasebank"
FIQA_HUB_ID = "pauri32/fiqa-2018"
TFNS_HUB_ID = "zeroshot/twitter-financial-news-sentiment"
NWGI_HUB_ID = "oliverwang15/news_with_gpt_instructions"

# The paper's splits: `train_test_split(seed=42)` of the datasets library over the published order of rows.
_SPLIT_SEED = 42
_FPB_TEST_SHARE = 0.25
_FIQA_PAPER_TEST_SHARE = 0.226

_MIT = "MIT (by FinLoRA's README)"
NEWS = Form(render=lambda text, _about: sentiment_prompt(text, "news"), choices=SENTIMENTS)
POST = Form(render=lambda text, _about: sentiment_prompt(text, "tweet"), choices=SENTIMENTS)
GRADES = Form(render=lambda text, _about: seven_sentiment_prompt(text), choices=SEVEN_SENTIMENTS)

_BY_NAME = {name: name for name in SENTIMENTS}
_FPB_LABELS = {**_BY_NAME, "0": "negative", "1": "neutral", "2": "positive"}
_TFNS_LABELS = {"0": "negative", "1": "positive", "2": "neutral"}
_FIQA_LABELS = {"0": "positive", "1": "neutral", "2": "negative"}
_FIQA_COLUMNS = ("sentence", "sentiment_score", "format")

_Item = TypeVar("_Item")


def read_fpb(request: Request) -> Splits:
    """Read Financial PhraseBank, half agreement: 4,846 sentences, a quarter of them for the test."""
    notes = [_split_note(_FPB_TEST_SHARE)]
    if request.source is None:
        # The default branch is a loading script, which is never run; the hub keeps a converted copy.
        rows = load_hub_rows(
            FPB_HUB_ID, "train", ("sentence", "label"), revision="refs/convert/parquet", data_dir="sentences_50agree"
        )
    else:
        path = find_file(request.source, ("Sentences_50Agree.txt", "all-data.csv"), "fpb")
        rows = _read_fpb_csv(path) if path.suffix.lower() == ".csv" else _read_fpb_lines(path)
    train, test = _permuted_split(rows, _FPB_TEST_SHARE)

    def example(split: str, number: int, row: Row) -> Example:
        label = row.one_of("label", _FPB_LABELS)
        return _three_way("fpb", split, number, row, "sentence", label, is_post=False)

    return Splits(train=_build("train", train, example), test=_build("test", test, example), notes=tuple(notes))


def read_fiqa(request: Request) -> Splits:
    """Read FiQA's own train and test split, which share no sentence: 961 / 150."""
    parts = _read_fiqa_parts(request)
    notes = [f"The validation split ({len(parts['validation'])} rows, mostly sentences of train) is left out."]
    return _fiqa_splits("fiqa", parts["train"], parts["test"], notes)


def read_fiqa_paper(request: Request) -> Splits:
    """Read the split that the paper's FiQA scores are on: 938 / 275 of all three parts together, shuffled."""
    parts = _read_fiqa_parts(request)
    train, test = _permuted_split([*parts["train"], *parts["validation"], *parts["test"]], _FIQA_PAPER_TEST_SHARE)
    notes = [
        _split_note(_FIQA_PAPER_TEST_SHARE),
        "Some test sentences are also in train, because the validation part repeats them: the task `fiqa` has a clean split.",
    ]
    return _fiqa_splits("fiqa_paper", train, test, notes)


def read_tfns(request: Request) -> Splits:
    """Read Twitter Financial News Sentiment: 9,543 / 2,388 posts, the published validation part as test."""

    def read(names: Sequence[str], split: str) -> list[Row]:
        if request.source is None:
            return load_hub_rows(TFNS_HUB_ID, split, ("text", "label"))
        return read_csv(find_file(_folder(request.source, "tfns"), names, "tfns"), "utf-8", ("text", "label"))

    def example(split: str, number: int, row: Row) -> Example:
        label = row.one_of("label", _TFNS_LABELS)
        return _three_way("tfns", split, number, row, "text", label, is_post=True)

    return Splits(
        train=_build("train", read(("sent_train.csv",), "train"), example),
        test=_build("test", read(("sent_valid.csv",), "validation"), example),
        notes=(
            "FinLoRA's later tfns_test.jsonl swaps neutral and positive; this reads the labels as first published.",
        ),
    )


def read_nwgi(request: Request) -> Splits:
    """Read NWGI: the answer is one of seven grades, the label folds them to three. 16,184 / 4,047 news texts."""

    def read(split: str) -> list[Row]:
        if request.source is None:
            return load_hub_rows(NWGI_HUB_ID, split, ("news", "label"))
        names = (f"finlora_nwgi_{split}.jsonl", f"nwgi_{split}.jsonl")
        try:
            path = find_file(_folder(request.source, "nwgi"), names, "nwgi")
        except DatasetError as error:
            if split == "test" or not request.source.is_dir():
                raise
            raise DatasetError(f"{error} To prepare the test split alone, choose --splits test.") from None
        return [_nwgi_row(row) for row in read_jsonl(path, ("context", "target"))]

    return Splits(
        train=() if request.splits == "test" else _build("train", read("train"), _seven_way),
        test=_build("test", read("test"), _seven_way),
        notes=("Seven grades are folded to three for the metrics: any `positive`, any `negative`, else neutral.",),
    )


def _read_fpb_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_lines(path, "latin-1"), start=1):
        sentence, at, label = line.rpartition("@")
        row = Row(fields={"sentence": sentence, "label": label, "line": line}, source=f"{path.name}:{number}")
        if not at:
            raise row.fault("line", line, "`sentence@label`")
        rows.append(row)
    return rows


def _read_fpb_csv(path: Path) -> list[Row]:
    """Read a CSV copy: label and sentence in either order, with or without a header line of any names."""
    rows = read_csv(path, "latin-1", (), _name_fpb_columns)
    columns = list(rows[0].fields)
    if columns[0] != "label" and rows[0].fields[columns[0]].strip() not in _FPB_LABELS:
        columns.reverse()
    label, sentence = columns
    return [
        Row(fields={"label": row.fields[label], "sentence": row.fields[sentence]}, source=row.source) for row in rows
    ]


def _name_fpb_columns(values: Sequence[str], source: str) -> Sequence[str] | None:
    """Distinguish a first row from a header: a row holds a label.

    Raises:
        DatasetError: there are not two columns.
    """
    if len(values) != 2:
        shown = ", ".join(shorten(value) for value in values[:4])
        raise DatasetError(
            f"{source}: found {counted(len(values), 'column')} ({shown}), expected two, label and sentence, separated by "
            "a comma, with sentences that hold one in quotes."
        )
    is_label = [value.strip() in _FPB_LABELS for value in values]
    if not any(is_label):
        return None
    return ("label", "sentence") if is_label[0] else ("sentence", "label")


def _read_fiqa_parts(request: Request) -> dict[str, list[Row]]:
    parts = {}
    for part in ("train", "validation", "test"):
        if request.source is None:
            parts[part] = load_hub_rows(FIQA_HUB_ID, part, _FIQA_COLUMNS)
        else:
            names = (f"fiqa-2018.{part}.arrow", f"fiqa-2018-{part}.arrow")
            parts[part] = read_arrow(find_file(_folder(request.source, "fiqa"), names, "fiqa"), _FIQA_COLUMNS)
    return parts


def _fiqa_splits(task: str, train: Sequence[Row], test: Sequence[Row], notes: list[str]) -> Splits:
    def example(split: str, number: int, row: Row) -> Example:
        score = row.number("sentiment_score")
        if abs(score) > 1:
            raise row.fault("sentiment_score", score, "a score from -1 to 1")
        label = _fiqa_label(score)
        is_post = row.one_of("format", {"post": "post", "headline": "news"}) == "post"
        return _three_way(task, split, number, row, "sentence", label, is_post=is_post)

    num_differing = sum(
        row.one_of("label", _FIQA_LABELS) != _fiqa_label(row.number("sentiment_score"))
        for row in (*train, *test)
        if "label" in row.fields
    )
    notes.append(
        "Labels are folded from the score at -0.1 and 0.1; the published label column differs on "
        f"{counted(num_differing, 'row')}."
    )
    return Splits(
        train=_build("train", train, example),
        test=_build("test", test, example),
        notes=tuple(notes),
    )


def _fiqa_label(score: float) -> str:
    if score < -0.1:
        return "negative"
    return "neutral" if score < 0.1 else "positive"


def _nwgi_row(row: Row) -> Row:
    """Extract the news from a published prompt, and check that our prompt is the same text."""
    context = row.text("context")
    news = context.partition("\nInput: ")[2].removesuffix("\nAnswer: ")
    if seven_sentiment_prompt(news) != context:
        raise row.fault("context", context, f"the prompt `{seven_sentiment_prompt('...')}`")
    return Row(fields={"news": news, "label": row.fields["target"]}, source=row.source)


def _seven_way(split: str, number: int, row: Row) -> Example:
    news = row.text("news")
    answer = row.one_of("label", {grade: grade for grade in SEVEN_SENTIMENTS})
    return Example(
        id=f"nwgi-{split}-{number}",
        task="nwgi",
        prompt=seven_sentiment_prompt(news),
        answer=answer,
        label=answer.split()[-1],
        choices=SEVEN_SENTIMENTS,
        source=row.source,
        group=news,
    )


def _three_way(task: str, split: str, number: int, row: Row, column: str, label: str, *, is_post: bool) -> Example:
    text = row.text(column)
    return Example(
        id=f"{task}-{split}-{number}",
        task=task,
        prompt=sentiment_prompt(text, "tweet" if is_post else "news"),
        answer=label,
        label=label,
        choices=SENTIMENTS,
        source=row.source,
        group=text,
    )


def _build(split: str, rows: Sequence[Row], example: Callable[[str, int, Row], Example]) -> tuple[Example, ...]:
    return tuple(example(split, number, row) for number, row in enumerate(rows))


def _permuted_split(rows: Sequence[_Item], test_share: float) -> tuple[list[_Item], list[_Item]]:
    import numpy as np  # slow import, which a question does not need

    order = np.random.default_rng(_SPLIT_SEED).permutation(len(rows))
    num_test = math.ceil(test_share * len(rows))
    return [rows[index] for index in order[num_test:]], [rows[index] for index in order[:num_test]]


def _split_note(test_share: float) -> str:
    return f"Split by the permutation of seed {_SPLIT_SEED} over the order of the rows, first {test_share:.1%} as test."


def _folder(source: Path, task: str) -> Path:
    if source.is_file():
        raise DatasetError(
            f"{source} is one file: expected the folder of {task}'s raw files. Pass the folder to --source."
        )
    return source


def _three(negative: int, neutral: int, positive: int) -> dict[str, int]:
    return dict(zip(SENTIMENTS, (negative, neutral, positive), strict=True))


TASKS = (
    published_task(
        "fpb",
        "Financial PhraseBank",
        "sentiment",
        FPB_HUB_ID,
        order=0,
        licence="CC BY-NC-SA 3.0",
        form=NEWS,
        read=read_fpb,
        published=(
            Published(
                train=3634,
                test=1212,
                train_hash="50338cce61fa4ab5",
                test_hash="2d733bb57907f5a9",
                labels=_three(604, 2879, 1363),
                test_labels=_three(145, 729, 338),
            ),
        ),
    ),
    published_task(
        "fiqa",
        "FiQA SA, the clean split",
        "sentiment",
        FIQA_HUB_ID,
        order=1,
        licence=_MIT,
        form=NEWS,
        read=read_fiqa,
        published=(
            Published(
                train=961,
                test=150,
                train_hash="e740f6aa2edb4747",
                test_hash="dd983cf010c31400",
                labels=_three(345, 82, 684),
                test_labels=_three(50, 49, 51),
            ),
        ),
    ),
    published_task(
        "fiqa_paper",
        "FiQA SA, the split of the paper's scores",
        "sentiment",
        FIQA_HUB_ID,
        order=2,
        licence=_MIT,
        form=NEWS,
        read=read_fiqa_paper,
        published=(
            Published(
                train=938,
                test=275,
                train_hash="a102ce72215afef5",
                test_hash="ff8e46c3f0eb63c3",
                labels=_three(379, 116, 718),
                test_labels=_three(88, 21, 166),
            ),
        ),
        is_asked=False,  # `fiqa` asks the same question
    ),
    published_task(
        "tfns",
        "Twitter Financial News Sentiment",
        "sentiment",
        TFNS_HUB_ID,
        order=3,
        licence=_MIT,
        form=POST,
        read=read_tfns,
        published=(
            Published(
                train=9543,
                test=2388,
                train_hash="aad95bb2c7f04f08",
                test_hash="5cd44140ac7626f2",
                labels=_three(1789, 7744, 2398),
                test_labels=_three(347, 1566, 475),
            ),
        ),
    ),
    published_task(
        "nwgi",
        "News With GPT Instructions",
        "sentiment",
        NWGI_HUB_ID,
        order=4,
        licence=_MIT,
        form=GRADES,
        read=read_nwgi,
        published=(
            Published(train=16_184, test=4047, test_hash="6c7c875c8474ed38", test_labels=_three(1342, 491, 2214)),
        ),
    ),
)
