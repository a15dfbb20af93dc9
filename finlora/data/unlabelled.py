"""Unlabelled pretraining texts from prepared train splits: their inputs as plain text and in self-supervised questions.

The questions ask about words of the input only, in the tasks' completion form, so that a small base learns to read an
input and answer in a word, and never sees a label.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from finlora.data.prompts import YES_NO, completion


def input_of(prompt: str) -> str:
    """Return the text under `Input:` of a completion prompt; the whole prompt where it has none (XBRL)."""
    _, found, rest = prompt.partition("\nInput: ")
    return rest.removesuffix("\nAnswer: ") if found else prompt


def unlabelled_texts(inputs: Sequence[str], seed: int) -> list[str]:
    """Return each input three times: as it is, and in two questions about its words; in a seeded order."""
    rng = random.Random(f"unlabelled-{seed}")
    words = sorted({word for text in inputs for word in text.split()[:50]})
    texts: list[str] = []
    for text in inputs:
        own = text.split()
        if not own:
            continue
        texts += [text, _ask_for_word(rng, text, own), _ask_whether(rng, text, own, words)]
    rng.shuffle(texts)
    return texts


def _ask_for_word(rng: random.Random, text: str, own: Sequence[str]) -> str:
    place, word = rng.choice([("first", own[0]), ("last", own[-1])])
    return completion(f"What is the {place} word of the input?", text) + word


def _ask_whether(rng: random.Random, text: str, own: Sequence[str], words: Sequence[str]) -> str:
    word = rng.choice(own) if rng.random() < 0.5 else rng.choice(words)
    answer = YES_NO[0] if word in own else YES_NO[1]
    return (
        completion(f"Does the word {word} stand in the input? Please choose an answer from {{Yes/No}}.", text) + answer
    )
