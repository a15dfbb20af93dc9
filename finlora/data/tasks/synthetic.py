"""Generated financial set for the demo and the tests: five tasks, seeded, with balanced labels.

A hash of an example's group (company, city, entity or filing) decides its split, so no test name is in train.
A label depends on a pair of words, not on one of them: "net loss fell" is good news, "profit fell" is not.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from finlora.data.example import Example, Splits
from finlora.data.prompts import (
    ENTITY_PARAPHRASES,
    ENTITY_TYPES,
    SENTIMENTS,
    YES_NO,
    entity_prompt,
    headline_prompt,
    sentiment_prompt,
    xbrl_formula_question,
    xbrl_prompt,
    xbrl_tag_question,
    xbrl_value_question,
)
from finlora.data.task import Request, generated_task
from finlora.data.tasks import synthetic_words as words
from finlora.data.tasks.formulas import Formula

Side = Literal["train", "test"]

NUM_TRAIN, NUM_TEST = 2400, 600
SEED = 20240607
FORMULAS = tuple(Formula(name=name, expression=text, num_decimals=digits) for name, text, digits in words.FORMULAS)
_NUM_LINE_ITEMS = 5
_TEST_SHARE_OF_256 = 52


@dataclass(frozen=True, slots=True)
class Filing:
    """A generated XBRL fragment: the number of each tag, in the order of the file."""

    company: str
    year: int
    values: Mapping[str, int]

    @property
    def fragment(self) -> str:
        return "\n".join(f"<us-gaap:{tag}>{value}</>" for tag, value in self.values.items())


def side_of(group: str) -> Side:
    """Return the split of a group: about a fifth of all groups are test groups."""
    return "test" if hashlib.sha256(group.encode()).digest()[0] < _TEST_SHARE_OF_256 else "train"


def company_name(rng: random.Random, side: Side) -> str:
    """Sample a company of one split."""
    return _sample_name(side, lambda: f"{_stem(rng)} {rng.choice(words.COMPANY_FORMS)}")


def city_name(rng: random.Random, side: Side) -> str:
    """Sample a city of one split; cities and companies share stems, so a stem alone reveals nothing."""
    return _sample_name(side, lambda: _stem(rng))


def person_name(rng: random.Random, side: Side) -> str:
    """Sample a person of one split."""
    return _sample_name(side, lambda: f"{rng.choice(words.FIRST_NAMES)} {_stem(rng)}")


def sentiment_sentence(rng: random.Random, side: Side, label: str) -> tuple[str, str]:
    """Write a news sentence of the given sentiment; return it with its company."""
    company = company_name(rng, side)
    month, amount, percent = rng.choice(words.MONTHS), rng.randint(11, 989), rng.randint(2, 48)
    if label == "neutral":
        event = rng.choice(words.NEUTRAL_EVENTS).format(month=month, city=city_name(rng, side))
        noun = rng.choice(words.GOOD_NOUNS + words.BAD_NOUNS)
        flat = f"{company} said its {noun} of {amount} million {rng.choice(words.FLAT_VERBS)} in {month} ."
        return (flat if rng.random() < 0.4 else f"{company} {event} ."), company
    is_good = label == "positive"
    if rng.random() < 0.25:
        event = rng.choice(words.GOOD_EVENTS if is_good else words.BAD_EVENTS)
        return f"{company} {event} in {month} .", company
    has_good_noun = rng.random() < 0.7
    noun = rng.choice(words.GOOD_NOUNS if has_good_noun else words.BAD_NOUNS)
    verb = rng.choice(words.UP_VERBS if is_good == has_good_noun else words.DOWN_VERBS)
    templates = (
        f"{company} said its {noun} {verb} by {percent} % to {amount} million in {month} .",
        f"In {month} , the {noun} of {company} {verb} to {amount} million .",
        f"{noun.capitalize()} {verb} {percent} % at {company} .",
    )
    return rng.choice(templates), company


def headline(rng: random.Random, side: Side, label: str) -> tuple[str, str]:
    """Write a headline that does or does not report a rising price; return it with its city."""
    metal, city, percent = rng.choice(words.METALS), city_name(rng, side), rng.randint(1, 9)
    reason = rng.choice(words.REASONS)
    if label == "Yes":
        return f"{metal} {rng.choice(words.PRICE_UP)} {percent}% in {city} {reason}", city
    others = (
        f"{metal} {rng.choice(words.PRICE_DOWN)} {percent}% in {city} {reason}",
        f"{metal} {rng.choice(words.PRICE_FLAT)} in {city} {reason}",
        f"{metal} {rng.choice(words.METAL_NEWS)} in {city} {reason}",
    )
    return rng.choices(others, weights=(2, 1, 1))[0], city


def entity_sentence(rng: random.Random, side: Side) -> tuple[str, dict[str, str]]:
    """Write a sentence of an agreement; return it with its entity of each type."""
    organization = company_name(rng, side) if rng.random() < 0.7 else city_name(rng, side)
    entities = {"organization": organization, "person": person_name(rng, side), "location": city_name(rng, side)}
    while entities["location"] in organization:
        entities["location"] = city_name(rng, side)
    return rng.choice(words.ENTITY_SENTENCES).format(**entities), entities


def filing(rng: random.Random, side: Side) -> Filing:
    """Write a filing of five line items with five different numbers."""
    tags = rng.sample(sorted(words.LINE_ITEMS), _NUM_LINE_ITEMS)
    numbers = rng.sample(range(101, 9990), _NUM_LINE_ITEMS)
    return Filing(company_name(rng, side), rng.randint(2015, 2024), dict(zip(tags, numbers, strict=True)))


def filing_for(rng: random.Random, side: Side, formula: Formula) -> Filing:
    """Write a filing with the formula's line items among others, and figures that are consistent with each other."""
    others = sorted(words.SHARES_OF_REVENUE.keys() - set(formula.tags))
    tags = [*formula.tags, *rng.sample(others, _NUM_LINE_ITEMS - len(formula.tags))]
    rng.shuffle(tags)
    revenue = rng.randint(2000, 9989)
    values = {tag: round(revenue * rng.uniform(*words.SHARES_OF_REVENUE[tag])) for tag in tags}
    return Filing(company_name(rng, side), rng.randint(2015, 2024), values)


def read_synthetic_sentiment(_request: Request) -> Splits:
    """Generate sentiment of news: three balanced labels."""

    def write(rng: random.Random, side: Side, turn: int) -> Example:
        label = SENTIMENTS[turn % 3]
        sentence, company = sentiment_sentence(rng, side, label)
        return _example("synthetic_sentiment", sentiment_prompt(sentence, "news"), label, SENTIMENTS, company)

    return _splits("synthetic_sentiment", write)


def read_synthetic_headline(_request: Request) -> Splits:
    """Generate headlines, each asked whether it reports a rising price: two balanced answers."""

    def write(rng: random.Random, side: Side, turn: int) -> Example:
        label = YES_NO[turn % 2]
        text, city = headline(rng, side, label)
        return _example("synthetic_headline", headline_prompt(text, "price up"), label, YES_NO, city)

    return _splits("synthetic_headline", write)


def read_synthetic_ner(_request: Request) -> Splits:
    """Generate sentences of agreements, each asked for an entity's type: three balanced types."""

    def write(rng: random.Random, side: Side, turn: int) -> Example:
        label = ENTITY_TYPES[turn % 3]
        sentence, entities = entity_sentence(rng, side)
        prompt = entity_prompt(sentence, entities[label], rng.randrange(len(ENTITY_PARAPHRASES)))
        return _example("synthetic_ner", prompt, label, ENTITY_TYPES, entities[label])

    return _splits("synthetic_ner", write)


def read_synthetic_xbrl(_request: Request) -> Splits:
    """Generate short XBRL fragments, asked alternately for a tag and a number that they hold."""

    def write(rng: random.Random, side: Side, turn: int) -> Example:
        report = filing(rng, side)
        tag = rng.choice(list(report.values))
        is_tag = turn % 2 == 0
        ask = xbrl_tag_question if is_tag else xbrl_value_question
        question = ask(words.LINE_ITEMS[tag], report.company, report.year)
        answer = f"us-gaap:{tag}" if is_tag else str(report.values[tag])
        prompt = xbrl_prompt(report.fragment, question)
        return _example("synthetic_xbrl", prompt, answer, (), f"{report.company} {report.year}")

    return _splits("synthetic_xbrl", write)


def read_synthetic_formulas(_request: Request) -> Splits:
    """Generate short XBRL fragments, each asked for a figure by a formula; the formulas take turns."""

    def write(rng: random.Random, side: Side, turn: int) -> Example:
        formula = FORMULAS[turn % len(FORMULAS)]
        report = filing_for(rng, side, formula)
        question = xbrl_formula_question(
            formula.name, formula.expression, formula.num_decimals, report.company, report.year
        )
        prompt = xbrl_prompt(report.fragment, question)
        return _example(
            "synthetic_formulas", prompt, formula.answer(report.values), (), f"{report.company} {report.year}"
        )

    return _splits("synthetic_formulas", write)


def read_synthetic(request: Request) -> Splits:
    """Interleave four tasks, all but the formulas, so that any first part of the set holds them in equal shares."""
    readers = (read_synthetic_sentiment, read_synthetic_headline, read_synthetic_ner, read_synthetic_xbrl)
    parts = [read(request) for read in readers]

    def mix(*splits: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(itertools.chain.from_iterable(zip(*splits, strict=True)))

    return Splits(
        train=mix(*(part.train for part in parts)),
        test=mix(*(part.test for part in parts)),
        notes=(*parts[0].notes, "The mix keeps each example's own task name and id."),
    )


def _splits(task: str, write: Callable[[random.Random, Side, int], Example]) -> Splits:
    note = "Generated from a seed: for trials and tests, never for claims about financial language."
    train = tuple(itertools.islice(_distinct(task, "train", write), NUM_TRAIN))
    test = tuple(itertools.islice(_distinct(task, "test", write), NUM_TEST))
    return Splits(train=train, test=test, notes=(note,))


def _distinct(task: str, side: Side, write: Callable[[random.Random, Side, int], Example]) -> Iterator[Example]:
    """Yield examples with distinct prompts; a repeated prompt is sampled again, so labels stay balanced."""
    rng = random.Random(f"{SEED}-{task}-{side}")
    seen: set[str] = set()
    for turn in itertools.count():
        example = write(rng, side, turn)
        while example.prompt in seen:
            example = write(rng, side, turn)
        seen.add(example.prompt)
        yield Example(
            id=f"{task}-{side}-{turn}",
            task=task,
            prompt=example.prompt,
            answer=example.answer,
            label=example.label,
            choices=example.choices,
            source=f"finlora/data/tasks/synthetic.py:{SEED}",
            group=example.group,
        )


def _example(task: str, prompt: str, answer: str, choices: tuple[str, ...], group: str) -> Example:
    return Example(
        id="", task=task, prompt=prompt, answer=answer, label=answer, choices=choices, source="", group=group
    )


def _stem(rng: random.Random) -> str:
    return rng.choice(words.FIRST_SYLLABLES) + rng.choice(words.SECOND_SYLLABLES)


def _sample_name(side: Side, write: Callable[[], str]) -> str:
    name = write()
    while side_of(name) != side:
        name = write()
    return name


TASKS = (
    generated_task(
        "synthetic_sentiment",
        "Generated sentiment of news",
        read_synthetic_sentiment,
        order=40,
        choices=SENTIMENTS,
        asked_as="fpb",
    ),
    generated_task(
        "synthetic_headline",
        "Generated headlines: does the price go up?",
        read_synthetic_headline,
        order=41,
        choices=YES_NO,
        asked_as="headline",
    ),
    generated_task(
        "synthetic_ner",
        "Generated entity types",
        read_synthetic_ner,
        order=42,
        choices=ENTITY_TYPES,
        asked_as="ner",
    ),
    generated_task(
        "synthetic_xbrl", "Generated XBRL tags and numbers", read_synthetic_xbrl, order=43, is_free_text=True
    ),
    generated_task(
        "synthetic_formulas",
        "Generated XBRL formulas: margins and ratios",
        read_synthetic_formulas,
        order=44,
        is_free_text=True,
    ),
    generated_task(
        "synthetic",
        "Four generated tasks together, all but formulas",
        read_synthetic,
        order=45,
    ),
)
