"""Unlabelled pretraining texts from prepared train splits: their inputs as plain text and in self-supervised questions.

The questions ask only about words of the input, in the tasks' completion form. So a small base learns to read an input and
to answer with one of the listed options, and never sees a label.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from finlora.data.prompts import ENTITY_TYPES, SENTIMENTS, YES_NO, choose, completion

NUM_QUESTIONS = 4
"""Questions asked about an input of enough words; each is new text, while more steps would only repeat old text."""
GAP = "___"
_REPEAT_EVERY = 8
_NUM_OPTIONS = 3


def input_of(prompt: str) -> str:
    """Return the text under `Input:` of a completion prompt, or the complete prompt if it has none (XBRL)."""
    _, found, rest = prompt.partition("\nInput: ")
    return rest.removesuffix("\nAnswer: ") if found else prompt


def unlabelled_texts(inputs: Sequence[str], seed: int) -> list[str]:
    """Return each input as plain text and in questions about its words, in a seeded order.

    Adds prompts that ask to repeat an answer's word: without them the words of the closed answers would be rare, and a frozen
    output head could hardly produce them. No text of a task occurs with its label.
    """
    rng = random.Random(f"unlabelled-{seed}")
    corpus = _Corpus.of(inputs)
    texts: list[str] = []
    for number, text in enumerate(text for text in inputs if text.split()):
        own = text.split()
        texts.append(text)
        if number % _REPEAT_EVERY == 0:
            texts.append(_repeat_answer(rng))
        # The gap and the choice are most like a task, so every input that allows them gets them.
        asked = [_ask_for_gap, _ask_which_occurs, *rng.sample(_SIMPLE_QUESTIONS, NUM_QUESTIONS - 2)]
        texts += [question for ask in asked if (question := ask(rng, own, corpus)) is not None]
    rng.shuffle(texts)
    return texts


@dataclass(frozen=True, slots=True)
class _Corpus:
    """Pool of wrong options. It holds a word as often as the inputs do, so that rarity reveals no answer."""

    words: list[str]
    after: dict[str, list[str]]
    """Word -> words that follow it somewhere: options that fit a gap after it."""

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
    """Return whether a word can be an option: no slash, brace or number, and not a particle."""
    return word.isalpha() and len(word) > 2


def _options(rng: random.Random, answer: str, pool: Sequence[str], excluded: Sequence[str]) -> list[str] | None:
    """Return the answer and wrong options from a pool in random order; None if the pool has too few."""
    wrong: list[str] = []
    for word in rng.choices(pool, k=4 * _NUM_OPTIONS) if pool else ():
        if word != answer and word not in wrong and word not in excluded:
            wrong.append(word)
        if len(wrong) == _NUM_OPTIONS - 1:
            return rng.sample([answer, *wrong], _NUM_OPTIONS)
    return None


def _ask_for_gap(rng: random.Random, own: Sequence[str], corpus: _Corpus) -> str | None:
    indices = [index for index in range(1, len(own)) if _is_plain(own[index])]
    if not indices:
        return None
    index = rng.choice(indices)
    answer = own[index]
    options = _options(rng, answer, corpus.after[own[index - 1]], ()) or _options(rng, answer, corpus.words, ())
    if options is None:
        return None
    text = " ".join([*own[:index], GAP, *own[index + 1 :]])
    return completion(f"What is the missing word of this input? {choose(options)}", text) + answer


def _ask_which_occurs(rng: random.Random, own: Sequence[str], corpus: _Corpus) -> str | None:
    plain = [word for word in own if _is_plain(word)]
    if not plain:
        return None
    answer = rng.choice(plain)
    options = _options(rng, answer, corpus.words, own)
    if options is None:
        return None
    return completion(f"What is the word that stands in this input? {choose(options)}", " ".join(own)) + answer


def _ask_for_end(rng: random.Random, own: Sequence[str], _corpus: _Corpus) -> str:
    end, word = rng.choice([("first", own[0]), ("last", own[-1])])
    return completion(f"What is the {end} word of the input?", " ".join(own)) + word


def _ask_for_next(rng: random.Random, own: Sequence[str], _corpus: _Corpus) -> str | None:
    indices = [index for index in range(len(own) - 1) if own.count(own[index]) == 1]
    if not indices:
        return None
    index = rng.choice(indices)
    return completion(f"What is the word after {own[index]} in the input?", " ".join(own)) + own[index + 1]


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
