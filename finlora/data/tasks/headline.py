"""Yes/No questions about gold headlines: nine from the full file, six from the short one.

Split by order of headlines, the first 80 % for training, so that no headline is in both: 9,129 and 2,283 of the full
file's 11,412 headlines (82,161 / 20,547 pairs), 8,456 and 2,114 of the short file's 10,570 (50,736 / 12,684).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from finlora.data.example import Example, Splits
from finlora.data.prompts import HEADLINE_QUESTIONS, YES_NO, completion, headline_prompt
from finlora.data.question import Form
from finlora.data.raw.hub_rows import load_hub_rows
from finlora.data.raw.rows import Row, find_file, read_csv
from finlora.data.task import Published, Request, Task, published_task
from finlora.errors import DatasetError

HUB_ID = "FinGPT/fingpt-headline-cls"
_TRAIN_SHARE = 0.8
_FILE_NAMES = ("gold-dataset-sinha-khandait.csv", "finalDataset_0208.csv", "headline.csv")
_ANSWERS = {"1": "Yes", "0": "No"}
FORM = Form(render=headline_prompt, choices=YES_NO, about="question", about_values=tuple(HEADLINE_QUESTIONS))
_HUB_ANSWERS = {"Yes": "Yes", "No": "No"}

# Column to question. Names are compared without blanks and case, in which copies of the file differ.
_SIX_COLUMNS = {
    "pricedirectionup": "price up",
    "pricedirectionconstant": "price constant",
    "pricedirectiondown": "price down",
    "assetcomparision": "asset comparison",
    "pastinformation": "past",
    "futureinformation": "future",
}
_NINE_COLUMNS = {
    "priceornot": "price",
    "pricedirectionup": "price up",
    "pricedirectionconstant": "price constant",
    "pricedirectiondown": "price down",
    "pastprice": "past price",
    "futureprice": "future price",
    "pastnews": "past event",
    "futurenews": "future event",
    "assetcomparision": "asset comparison",
}


def read_headline(request: Request) -> Splits:
    """Read the headlines and ask every question about each of them.

    Raises:
        DatasetError: a malformed row, neither set of columns, or `corrected` for the hub's ready-made pairs.
    """
    if request.source is None:
        return _read_hub(request)
    rows = read_csv(find_file(request.source, _FILE_NAMES, "headline"), "utf-8", ("News",))
    columns = {column.replace(" ", "").lower(): column for column in rows[0].fields}
    if set(_NINE_COLUMNS) <= set(columns):
        questions = {columns[name]: question for name, question in _NINE_COLUMNS.items()}
        note = _price_note(request.variant)
    elif set(_SIX_COLUMNS) <= set(columns):
        questions = {columns[name]: question for name, question in _SIX_COLUMNS.items()}
        note = "The short file answers 6 of the paper's 9 questions, so its scores are not the paper's; variants agree."
    else:
        raise DatasetError(
            f"{rows[0].source}: found columns {', '.join(rows[0].fields)}, expected News and the nine question columns "
            "of the full file (Price or Not, ...) or the six of the short one (Past Information, ...). Correct --source."
        )
    num_train = int(_TRAIN_SHARE * len(rows))
    is_published = request.variant == "as_published"
    return Splits(
        train=_ask("train", rows[:num_train], questions, is_published),
        test=_ask("test", rows[num_train:], questions, is_published),
        notes=(
            f"{len(rows)} headlines x {len(questions)} questions, split by order: the first {num_train} train.",
            note,
        ),
    )


def _price_note(variant: str) -> str:
    if variant == "as_published":
        return "As published, `talk about price?` is answered from Price Direction Constant instead of Price or Not."
    return (
        "Corrected: `talk about price?` is answered from Price or Not; the published set used Price Direction Constant."
    )


def _ask(split: str, rows: Sequence[Row], questions: Mapping[str, str], is_published: bool) -> tuple[Example, ...]:
    constant = next(column for column, question in questions.items() if question == "price constant")
    examples: list[Example] = []
    for row in rows:
        headline = row.text("News")
        for column, question in questions.items():
            answer = row.one_of(constant if is_published and question == "price" else column, _ANSWERS)
            examples.append(
                _pair(split, len(examples), headline_prompt(headline, question), answer, row.source, headline)
            )
    return tuple(examples)


def _read_hub(request: Request) -> Splits:
    if request.variant != "as_published":
        raise DatasetError(
            f"{HUB_ID} holds ready-made pairs with the published labels, but variant={request.variant} was asked. "
            "Pass the raw csv with --source, or choose the variant as_published."
        )

    def read(split: str) -> tuple[Example, ...]:
        rows = load_hub_rows(HUB_ID, split, ("instruction", "input", "output"))
        return tuple(
            _pair(
                split,
                number,
                completion(row.text("instruction"), row.text("input")),
                row.one_of("output", _HUB_ANSWERS),
                row.source,
                row.text("input"),
            )
            for number, row in enumerate(rows)
        )

    return Splits(train=read("train"), test=read("test"), notes=(_price_note("as_published"),))


def _pair(split: str, number: int, prompt: str, answer: str, source: str, headline: str) -> Example:
    return Example(
        id=f"headline-{split}-{number}",
        task="headline",
        prompt=prompt,
        answer=answer,
        label=answer,
        choices=YES_NO,
        source=source,
        group=headline,
    )


TASKS: tuple[Task, ...] = (
    published_task(
        "headline",
        "Gold headlines, Yes/No questions",
        "headline",
        HUB_ID,
        order=10,
        licence="CC BY-SA 3.0 (by FinLoRA's README)",
        form=FORM,
        read=read_headline,
        variants=("as_published", "corrected"),
        published=(
            Published(train=82_161, test=20_547),
            Published(
                train=50_736,
                test=12_684,
                train_hash="e5a2726c85d4d311",
                test_hash="31afddc7e7930639",
                labels={"No": 42_080, "Yes": 21_340},
                test_labels={"No": 8437, "Yes": 4247},
                is_of_hub=False,
            ),
        ),
    ),
)
