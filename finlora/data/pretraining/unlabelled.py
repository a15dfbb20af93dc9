"""Unlabelled pretraining texts from prepared train splits: their inputs as plain text and in self-supervised questions.

The questions ask about words of the input only, in the tasks' completion form, so that a small base learns to read an
input and to answer with one of the options that the prompt lists, and never sees a label.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from finlora.data.prompts import ENTITY_TYPES, SENTIMENTS, YES_NO, choose, completion

NUM_QUESTIONS = 4
"""Questions asked about an input of enough words; each is new text, where more steps would only repeat the old."""
GAP = "___"
_REPEAT_EVERY = 8
_NUM_OPTIONS = 3


def input_of(prompt: str) -> str:
    """Return the text under `Input:` of a completion prompt; the whole prompt where it has none (XBRL)."""
    _, found, rest = prompt.partition("\nInput: ")
    return rest.removesuffix("\nAnswer: ") if found else prompt


def unlabelled_texts(inputs: Sequence[str], seed: int) -> list[str]:
    """Return each input as it is and in questions about its words, in a seeded order.

    Beside them stand prompts whose input is an answer's own word, to be repeated: without them the words of the closed
    answers would be rare, and a frozen output head could hardly say them. No text of a task meets its label anywhere.
    """
    rng = random.Random(f"unlabelled-{seed}")
    corpus = _Corpus.of(inputs)
    texts: list[str] = []
    for number, text in enumerate(text for text in inputs if text.split()):
        own = text.split()
        texts.append(text)
        if number % _REPEAT_EVERY == 0:
            texts.append(_repeat_answer(rng))
        # The gap and the choice are the nearest to a task, so they are asked of every input that allows them.
        asked = [_ask_for_gap, _ask_which_stands, *rng.sample(_SIMPLE_QUESTIONS, NUM_QUESTIONS - 2)]
        texts += [question for ask in asked if (question := ask(rng, own, corpus)) is not None]
    rng.shuffle(texts)
    return texts


@dataclass(frozen=True, slots=True)
class _Corpus:
    """Pool of wrong options. A word is in it as often as it occurs, so that rarity reveals no answer."""

    words: list[str]
    after: dict[str, list[str]]
    """Word -> words that follow it somewhere: options that fit a gap by its left neighbour alone."""

    @classmethod
    def of(cls, inputs: Sequence[str]) -> _Corpus:
        words: list[str] = []
        after: defaultdict[str, list[str]] = defaultdict(list)
        for text in inputs:
            own = text.split()
            words += filter(_is_plain, own)
            for left, word in pairwise(own):
                if _is_plain(word):
                    after[left].append(word)
        return cls(words, dict(after))


def _is_plain(word: str) -> bool:
    """Whether a word can stand among options: no slash, brace or number, and more than a particle."""
    return word.isalpha() and len(word) > 2


def _options(rng: random.Random, answer: str, pool: Sequence[str], excluded: Sequence[str]) -> list[str] | None:
    """Return the answer and wrong options from a pool in any order; None where the pool has too few."""
    wrong: list[str] = []
    for word in rng.choices(pool, k=4 * _NUM_OPTIONS) if pool else ():
        if word != answer and word not in wrong and word not in excluded:
            wrong.append(word)
        if len(wrong) == _NUM_OPTIONS - 1:
            return rng.sample([answer, *wrong], _NUM_OPTIONS)
    return None


def _ask_for_gap(rng: random.Random, own: Sequence[str], corpus: _Corpus) -> str | None:
    places = [place for place in range(1, len(own)) if _is_plain(own[place])]
    if not places:
        return None
    place = rng.choice(places)
    answer = own[place]
    options = _options(rng, answer, corpus.after[own[place - 1]], ()) or _options(rng, answer, corpus.words, ())
    if options is None:
        return None
    text = " ".join([*own[:place], GAP, *own[place + 1 :]])
    return completion(f"What is the missing word of this input? {choose(options)}", text) + answer


def _ask_which_stands(rng: random.Random, own: Sequence[str], corpus: _Corpus) -> str | None:
    plain = [word for word in own if _is_plain(word)]
    if not plain:
        return None
    answer = rng.choice(plain)
    options = _options(rng, answer, corpus.words, own)
    if options is None:
        return None
    return completion(f"What is the word that stands in this input? {choose(options)}", " ".join(own)) + answer


def _ask_for_end(rng: random.Random, own: Sequence[str], _corpus: _Corpus) -> str:
    place, word = rng.choice([("first", own[0]), ("last", own[-1])])
    return completion(f"What is the {place} word of the input?", " ".join(own)) + word


def _ask_for_next(rng: random.Random, own: Sequence[str], _corpus: _Corpus) -> str | None:
    places = [place for place in range(len(own) - 1) if own.count(own[place]) == 1]
    if not places:
        return None
    place = rng.choice(places)
    return completion(f"What is the word after {own[place]} in the input?", " ".join(own)) + own[place + 1]


def _ask_for_order(rng: random.Random, own: Sequence[str], _corpus: _Corpus) -> str | None:
    plain = [word for word in dict.fromkeys(own) if _is_plain(word)]
    if len(plain) < 2:
        return None
    pair = rng.sample(plain, 2)
    return completion(f"What is the earlier word in this input? {choose(pair)}", " ".join(own)) + min(
        pair, key=own.index
    )


def _ask_whether(rng: random.Random, own: Sequence[str], corpus: _Corpus) -> str:
    word = rng.choice(own) if rng.random() < 0.5 or not corpus.words else rng.choice(corpus.words)
    answer = YES_NO[0] if word in own else YES_NO[1]
    question = f"Does the word {word} stand in the input? {choose(YES_NO)}"
    return completion(question, " ".join(own)) + answer


def _repeat_answer(rng: random.Random) -> str:
    options = rng.choice((SENTIMENTS, YES_NO, ENTITY_TYPES))
    word = rng.choice(options)
    return completion(f"Repeat the input. {choose(options)}", word) + word


_SIMPLE_QUESTIONS: tuple[Callable[[random.Random, Sequence[str], _Corpus], str | None], ...] = (
    *(_ask_for_end, _ask_for_next, _ask_for_order, _ask_whether),
)
