"""Unlabelled texts for pretraining the small demo base: words and forms of the generated set, never its labels.

As a real base before fine-tuning, the demo base has seen such texts but not the tasks: it can copy, find a word and answer
in one word, but does not know sentiment, prices, entity types or tags. Only names of the train split occur.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from finlora.data.prompts import (
    ENTITY_TYPES,
    SENTIMENTS,
    YES_NO,
    choose,
    completion,
)
from finlora.data.tasks import synthetic_words as words
from finlora.data.tasks.synthetic import Side, company_name, entity_sentence, filing, headline, sentiment_sentence

_SIDE: Side = "train"


def pretraining_texts(seed: int, num_texts: int) -> list[str]:
    """Return texts for next-token training in a seeded order: plain ones and self-supervised questions.

    Args:
        seed: the same seed and number give the same texts.
        num_texts: number of texts; some may repeat.
    """
    rng = random.Random(f"pretraining-{seed}")
    return [rng.choice(_FORMS)(rng) for _ in range(num_texts)]


def _sentence(rng: random.Random) -> str:
    """Sample one sentence of any task. Its label decides the words and is then dropped."""
    kind = rng.randrange(3)
    if kind == 0:
        return sentiment_sentence(rng, _SIDE, rng.choice(SENTIMENTS))[0]
    return headline(rng, _SIDE, rng.choice(YES_NO))[0] if kind == 1 else entity_sentence(rng, _SIDE)[0]


def _plain(rng: random.Random) -> str:
    return " ".join(_sentence(rng) for _ in range(rng.randint(1, 3)))


def _worded(rng: random.Random) -> str:
    """Combine nouns and verbs with words that fit them, as a newspaper does: what rises goes higher, a debt worries.

    So a base learns which words are alike before it learns a task. The pair that decides a sentence's label does not occur.
    """
    return " ".join(_collocation(rng) for _ in range(3))


def _collocation(rng: random.Random) -> str:
    company = company_name(rng, _SIDE)
    if rng.random() < 0.5:
        is_up = rng.random() < 0.5
        verb, height = (words.UP_VERBS, words.HIGHER) if is_up else (words.DOWN_VERBS, words.LOWER)
        return f"Shares of {company} {rng.choice(verb)} {rng.choice(height)} in {rng.choice(words.MONTHS)} ."
    is_good = rng.random() < 0.5
    noun, effect = (words.GOOD_NOUNS, words.PLEASED) if is_good else (words.BAD_NOUNS, words.WORRIED)
    return f"The {rng.choice(noun)} {rng.choice(effect)} {company} in {rng.choice(words.MONTHS)} ."


def _fragment(rng: random.Random) -> str:
    report = filing(rng, _SIDE)
    return f"XBRL file:\n```xml\n{report.fragment}\n```\n{report.company} , FY {report.year}"


def _repeat_company(rng: random.Random) -> str:
    sentence, company = sentiment_sentence(rng, _SIDE, rng.choice(SENTIMENTS))
    return completion("Repeat the company named in the input.", sentence) + company


def _repeat_change(rng: random.Random) -> str:
    """Ask for the words that will decide a sentence's label, by their position, not by their meaning."""
    sentence, noun, verb = _change(rng)
    if rng.random() < 0.5:
        return completion("Repeat the word of the input that tells of a change.", sentence) + verb
    start = sentence.lower().index(noun)
    return completion("Repeat what changed in the input.", sentence) + sentence[start : start + len(noun)]


def _classify_change(rng: random.Random) -> str:
    """Ask for the class of the verb or for that of the noun, each whatever the other is; a label depends on both."""
    sentence, noun, verb = _change(rng)
    if rng.random() < 0.5:
        directions = (words.HIGHER[0], words.LOWER[0])
        question = f"Which way does the change of the input go? {choose(directions)}"
        return completion(question, sentence) + directions[verb in words.DOWN_VERBS]
    effects = (words.PLEASED[0], words.WORRIED[0])
    question = f"What does the thing that changed do to a company? {choose(effects)}"
    return completion(question, sentence) + effects[noun in words.BAD_NOUNS]


def _change(rng: random.Random) -> tuple[str, str, str]:
    """Sample a sentence that reports a change; return it with its noun in lower case and its verb."""
    sentence, verb = "", ""
    while not verb:  # some sentences report an event instead
        sentence = sentiment_sentence(rng, _SIDE, rng.choice(SENTIMENTS[::2]))[0]
        verb = next((verb for verb in words.UP_VERBS + words.DOWN_VERBS if f" {verb} " in sentence), "")
    return sentence, next(noun for noun in words.BAD_NOUNS + words.GOOD_NOUNS if noun in sentence.lower()), verb


def _repeat_first_word(rng: random.Random) -> str:
    sentence = _sentence(rng)
    return completion("Repeat the first word of the input.", sentence) + sentence.split()[0]


def _repeat_word(rng: random.Random) -> str:
    """Make every word of a closed answer likely after `Answer: `, without a text that it could label."""
    word = rng.choice((*SENTIMENTS, *YES_NO, *ENTITY_TYPES, *words.LINE_ITEMS.values()))
    return completion("Repeat the input.", word) + word


def _is_named(rng: random.Random) -> str:
    sentence, company = sentiment_sentence(rng, _SIDE, rng.choice(SENTIMENTS))
    is_named = rng.random() < 0.5
    asked = company if is_named else company_name(rng, _SIDE)
    question = f"Does the input name {asked}? Please choose an answer from {{Yes/No}}."
    return completion(question, sentence) + ("Yes" if asked == company else "No")


def _repeat_line(rng: random.Random) -> str:
    """Ask for copies from a fragment by tag or number, never by the meaning of a line."""
    report = filing(rng, _SIDE)
    tag = rng.choice(list(report.values))
    number = report.values[tag]
    question, answer = rng.choice(
        [
            (f"Copy the line that starts with <us-gaap:{tag}>.", f"<us-gaap:{tag}>{number}</>"),
            (f"Copy what stands before >{number}<.", f"us-gaap:{tag}"),
            (f"Copy what stands after <us-gaap:{tag}>.", str(number)),
        ]
    )
    return completion(question, report.fragment) + answer


# Five of thirteen texts are plain. Three of the questions are about a change: with fewer of them, a base of some hundred steps
# does not attend to nouns and verbs when it answers, and an adapter learns their combinations late or not at all.
_FORMS: tuple[Callable[[random.Random], str], ...] = (
    *(_plain, _plain, _worded, _worded, _fragment),
    *(_repeat_company, _repeat_first_word, _repeat_word, _is_named),
    *(_repeat_change, _classify_change, _classify_change, _repeat_line),
)
