"""Sampling against hand-computed nucleus probabilities, by frequency; each row is independent of its batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from finlora.engine.micro_batch import Sample
from finlora.stage.sampling import choice_log_probs, sample


def make_sample(temperature=1.0, top_p=1.0, seed=0, position=0):
    return Sample(0, temperature, top_p, seed, position)


def pairs(logits, samples):
    """Return each row's token and its log-probability."""
    tokens, log_probs = sample(logits, samples)
    return list(zip(tokens.tolist(), log_probs.tolist(), strict=True))


def logits_of(*probabilities):
    return torch.tensor([[math.log(p) for p in probabilities]])


def frequencies(logits, count=4000, **settings):
    rows = logits.expand(count, -1).clone()
    counts = Counter(token for token, _ in pairs(rows, [make_sample(position=n, **settings) for n in range(count)]))
    return {token: number / count for token, number in counts.items()}


def test_greedy_takes_the_likeliest_token_and_returns_its_log_probability():
    (token, log_prob), *_ = pairs(logits_of(0.2, 0.5, 0.3), [make_sample(temperature=0.0)])
    assert (token, log_prob) == (1, pytest.approx(math.log(0.5), abs=1e-6))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {0: 0.2, 1: 0.5, 2: 0.25, 3: 0.05}),
        # p^2, divided by the sum 0.355
        ({"temperature": 0.5}, {0: 0.04 / 0.355, 1: 0.25 / 0.355, 2: 0.0625 / 0.355, 3: 0.0025 / 0.355}),
        # 0.5 + 0.25 is below 0.8, so token 0 is in the nucleus too
        ({"top_p": 0.8}, {0: 0.2 / 0.95, 1: 0.5 / 0.95, 2: 0.25 / 0.95}),
        ({"top_p": 0.6}, {1: 0.5 / 0.75, 2: 0.25 / 0.75}),
        ({"top_p": 0.01}, {1: 1.0}),
    ],
)
def test_frequencies_equal_the_probabilities(settings, expected):
    """Four standard errors of 4,000 samples are at most 0.032."""
    found = frequencies(logits_of(0.2, 0.5, 0.25, 0.05), **settings)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=0.032)


def test_row_samples_the_same_token_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 50, generator=generator)
    samples = [make_sample(temperature=0.7 * (n % 3), top_p=0.9, seed=n, position=2 * n) for n in range(6)]
    together = pairs(logits, samples)
    assert [pairs(logits[n : n + 1], [samples[n]])[0] for n in range(6)] == together
    backwards = pairs(logits.flip(0), samples[::-1])
    assert backwards[::-1] == together


def test_sample_depends_on_seed_and_position():
    logits = torch.zeros(1, 1000)
    first = pairs(logits, [make_sample(seed=1)])
    assert pairs(logits, [make_sample(seed=1)]) == first
    assert pairs(logits, [make_sample(seed=2)]) != first
    assert pairs(logits, [make_sample(seed=1, position=1)]) != first


def test_log_probability_ignores_temperature_and_top_p():
    ((token, log_prob),) = pairs(logits_of(0.9, 0.1), [make_sample(temperature=0.1, top_p=0.5)])
    assert (token, log_prob) == (0, pytest.approx(math.log(0.9), abs=1e-6))


def test_scores_of_given_tokens_are_log_softmax():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 29, 7, 7, 3])
    expected = torch.log_softmax(logits, -1)[torch.arange(5), targets].tolist()
    assert choice_log_probs(logits, targets).tolist() == pytest.approx(expected, abs=1e-6)
    assert choice_log_probs(logits[:0], targets[:0]).tolist() == []
    assert pairs(logits[:0], []) == []
