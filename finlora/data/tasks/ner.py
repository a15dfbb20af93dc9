"""Entity types in SEC filings: (sentence, entity) pairs of FIN5 (train) and FIN3 (test), asked in 17 paraphrases.

The published builder gives every entity of a sentence the type of the last one. `as_published` keeps that, for the paper's
scores; `corrected` asks the same pairs with the gold type. Both have 797 and 206 pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finlora.data.example import Example, Splits
from finlora.data.prompts import ENTITY_PARAPHRASES, ENTITY_TYPES, completion, entity_prompt
from finlora.data.question import Form
from finlora.data.raw.hub_rows import load_hub_rows
from finlora.data.raw.rows import Row, find_file, read_lines
from finlora.data.task import Published, Request, Task, published_task
from finlora.errors import DatasetError

HUB_ID = "FinGPT/fingpt-ner-cls"
_TYPES = {"PER": "person", "ORG": "organization", "LOC": "location", "MISC": "miscellaneous"}
_TAGS = {"O": "", **{f"{mark}-{tag}": name for mark in "BI" for tag, name in _TYPES.items()}}
FORM = Form(render=lambda sentence, entity: entity_prompt(sentence, entity, 0), choices=ENTITY_TYPES, about="entity")
_HUB_TYPES = {name: name for name in ENTITY_TYPES}


@dataclass(frozen=True, slots=True)
class _Mention:
    entity: str
    type: str
    source: str


@dataclass(frozen=True, slots=True)
class _Sentence:
    text: str
    mentions: tuple[_Mention, ...]


@dataclass(frozen=True, slots=True)
class _Pair:
    sentence: str
    entity: str
    gold_type: str
    published_type: str
    source: str


def read_ner(request: Request) -> Splits:
    """Read both files: 13,549 / 3,502 examples, from 797 / 206 independent pairs.

    Raises:
        DatasetError: a malformed line, or `corrected` for the hub's ready-made pairs.
    """
    if request.source is None:
        return _read_hub(request)
    if request.source.is_file():
        raise DatasetError(f"{request.source} is one file: expected the folder that holds FIN5.txt and FIN3.txt.")
    notes: list[str] = []
    parts: dict[str, tuple[Example, ...]] = {}
    for split, name in (("train", "FIN5.txt"), ("test", "FIN3.txt")):
        pairs = _pairs(_read_conll(find_file(request.source, (name,), "ner")), f"{split} ({name})", notes)
        parts[split] = tuple(
            _example(split, number, pair, request.variant)
            for number, pair in enumerate((pair, index) for pair in pairs for index in range(len(ENTITY_PARAPHRASES)))
        )
    notes.append(
        f"Each pair is asked in {len(ENTITY_PARAPHRASES)} paraphrases (two are the published builder's, 15 ours; "
        "the published set repeats some rows), so intervals that count examples as independent are too narrow."
    )
    return Splits(train=parts["train"], test=parts["test"], notes=tuple(notes))


def _read_conll(path: Path) -> list[_Sentence]:
    sentences: list[_Sentence] = []
    words: list[tuple[str, str, str]] = []
    for number, line in enumerate([*read_lines(path, "utf-8"), ""], start=1):
        fields = line.split()
        if not fields:
            if words:
                sentences.append(_sentence(words))
            words = []
            continue
        row = Row(fields={"line": line, "tag": fields[-1]}, source=f"{path.name}:{number}")
        if len(fields) != 4:
            raise row.fault("line", line, "four fields `word part-of-speech - tag`, or a blank line between sentences")
        # Each document starts with a marker line, which holds no text.
        if fields[0] != "-DOCSTART-":
            words.append((fields[0], row.one_of("tag", _TAGS), row.source))
    if not sentences:
        raise DatasetError(
            f"{path} holds no sentence: expected CoNLL lines `word part-of-speech - tag`. Fetch it again."
        )
    return sentences


def _sentence(words: Sequence[tuple[str, str, str]]) -> _Sentence:
    """Join neighbouring words of one type into a mention; the files do not separate two mentions of the same type."""
    mentions: list[_Mention] = []
    previous = ""
    for word, type_, source in words:
        if type_ and type_ == previous:
            mentions[-1] = _Mention(f"{mentions[-1].entity} {word}", type_, mentions[-1].source)
        elif type_:
            mentions.append(_Mention(word, type_, source))
        previous = type_
    return _Sentence(" ".join(word for word, _, _ in words), tuple(mentions))


def _pairs(sentences: Sequence[_Sentence], where: str, notes: list[str]) -> list[_Pair]:
    pairs: dict[tuple[str, str], _Pair] = {}
    num_repeated = num_miscellaneous = num_after = 0
    for sentence in sentences:
        for mention in sentence.mentions:
            key = (sentence.text, mention.entity)
            published_type = sentence.mentions[-1].type
            if mention.type not in ENTITY_TYPES:
                num_miscellaneous += 1
            elif published_type not in ENTITY_TYPES:
                num_after += 1
            elif key in pairs:
                num_repeated += 1
            else:
                pairs[key] = _Pair(*key, mention.type, published_type, mention.source)
    num_contradicting = sum(pair.gold_type != pair.published_type for pair in pairs.values())
    notes.append(
        f"{where}: {len(pairs)} (sentence, entity) pairs; in {num_contradicting} of them the published type, "
        "that of the sentence's last entity, contradicts the gold type."
    )
    notes.append(
        f"{where}: left out {num_miscellaneous} mentions of type MISC, {num_after} in sentences whose last entity is "
        f"MISC, and {num_repeated} mentions that repeat a pair."
    )
    return list(pairs.values())


def _example(split: str, number: int, asked: tuple[_Pair, int], variant: str) -> Example:
    pair, paraphrase = asked
    answer = pair.published_type if variant == "as_published" else pair.gold_type
    return Example(
        id=f"ner-{split}-{number}",
        task="ner",
        prompt=entity_prompt(pair.sentence, pair.entity, paraphrase),
        answer=answer,
        label=answer,
        choices=ENTITY_TYPES,
        source=pair.source,
        group=f"{pair.entity} | {pair.sentence}",
    )


def _read_hub(request: Request) -> Splits:
    if request.variant != "as_published":
        raise DatasetError(
            f"{HUB_ID} holds ready-made pairs with the published types, but variant={request.variant} was asked. "
            "Pass the folder of FIN5.txt and FIN3.txt with --source, or choose the variant as_published."
        )

    def read(split: str) -> tuple[Example, ...]:
        rows = load_hub_rows(HUB_ID, split, ("instruction", "input", "output"))
        return tuple(_hub_example(split, number, row) for number, row in enumerate(rows))

    note = "As published, every entity of a sentence has the type of the last one; the hub's pairs cannot be corrected."
    return Splits(train=read("train"), test=read("test"), notes=(note,))


def _hub_example(split: str, number: int, row: Row) -> Example:
    instruction, sentence = row.text("instruction"), row.text("input")
    quoted = re.search(r"'(.+)'", instruction)
    if quoted is None:
        raise row.fault("instruction", instruction, "a question with the entity in single quotes")
    answer = row.one_of("output", _HUB_TYPES)
    return Example(
        id=f"ner-{split}-{number}",
        task="ner",
        prompt=completion(instruction, sentence),
        answer=answer,
        label=answer,
        choices=ENTITY_TYPES,
        source=row.source,
        group=f"{quoted[1]} | {sentence}",
    )


def _types(person: int, organization: int, location: int) -> dict[str, int]:
    return {"person": person, "organization": organization, "location": location}


TASKS: tuple[Task, ...] = (
    published_task(
        "ner",
        "Entity types in SEC filings",
        "ner",
        HUB_ID,
        order=20,
        licence="CC BY 3.0",
        form=FORM,
        read=read_ner,
        variants=("as_published", "corrected"),
        published=(
            Published(
                train=13_549,
                test=3502,
                test_labels=_types(2295, 697, 510),
                variant="as_published",
                is_of_hub=True,
            ),
            Published(
                train=13_549,
                test=3502,
                train_hash="e7e6a0a639aad2c7",
                test_hash="c5baf9372dfa7679",
                labels=_types(9826, 4318, 2907),
                test_labels=_types(2295, 697, 510),
                variant="as_published",
                is_of_hub=False,
            ),
            Published(
                train=13_549,
                test=3502,
                train_hash="33dc9aedaaafbc36",
                test_hash="50c84d1c1e438a4b",
                labels=_types(9911, 3944, 3196),
                test_labels=_types(2108, 816, 578),
                variant="corrected",
                is_of_hub=False,
            ),
        ),
    ),
)
