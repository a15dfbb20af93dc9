"""Near duplicates: banded MinHash finds the same groups as a comparison of all pairs."""

from __future__ import annotations

import random

from finlora.data.taskfile.duplicates import SIMILARITY, Groups, group_duplicates, normalise


def grams(text):
    plain = normalise(text)
    return {plain[start : start + 5] for start in range(len(plain) - 4)}


def test_groups_equal_those_of_all_pairs():
    rng = random.Random(5)
    words = [
        "profit",
        "loss",
        "rose",
        "fell",
        "quarter",
        "branch",
        "loan",
        "card",
        "customer",
        "rate",
        "margin",
        "bank",
    ]
    texts = []
    for _ in range(60):
        base = [rng.choice(words) for _ in range(24)]
        for _ in range(rng.choice([1, 1, 3])):
            copy = list(base)
            for _ in range(rng.randrange(3)):
                copy[rng.randrange(24)] = rng.choice(words)
            texts.append(" ".join(copy))
    rng.shuffle(texts)
    expected = Groups(len(texts))
    pairs = 0
    for row, text in enumerate(texts):
        for other in range(row):
            one, two = grams(text), grams(texts[other])
            if len(one & two) >= SIMILARITY * len(one | two):
                expected.join(row, other)
                pairs += 1
    assert 20 < pairs < 200
    assert group_duplicates(texts).roots() == expected.roots()


def test_digits_case_and_blanks_make_no_difference():
    texts = ["Paid EUR 12 on 3 May", "paid  eur 47 on 9 may", "Refused the loan", "x", "X", ""]
    assert group_duplicates(texts).roots() == [0, 0, 2, 3, 3, 5]


def test_many_copies_are_one_group():
    texts = [
        f"Dear bank, the statement of account {'abcdefghij'[row % 10]} is wrong again, please look."
        for row in range(300)
    ]
    assert set(group_duplicates(texts).roots()) == {0}
