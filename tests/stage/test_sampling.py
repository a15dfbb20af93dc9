"""Sampling against hand-computed nucleus probabilities, by frequency; each row is independent of its batch."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from finlora.engine.micro_batch import Filters, Sample
from finlora.stage.sampling import Unread, choice_log_probs, list_top, sample


def make_sample(temperature=1.0, top_p=1.0, seed=0, position=0, **filters):
    return Sample(0, temperature, top_p, seed, position, None, Filters(**filters) if filters else None)


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
        ({"top_k": 2}, {1: 0.5 / 0.75, 2: 0.25 / 0.75}),
        ({"top_k": 9}, {0: 0.2, 1: 0.5, 2: 0.25, 3: 0.05}),
        # 0.2 is below 0.45 of 0.5, which 0.25 reaches
        ({"min_p": 0.45}, {1: 0.5 / 0.75, 2: 0.25 / 0.75}),
        ({"min_p": 1.0}, {1: 1.0}),
        # 0.5 of the remaining 0.75 is two thirds, above 0.6; of all 1.0 it would be below
        ({"top_k": 2, "top_p": 0.6}, {1: 1.0}),
        # after the temperature: 0.25 / 0.5 squared is below 0.3
        ({"min_p": 0.3, "temperature": 0.5}, {1: 1.0}),
        ({"bias": ((3, math.log(4)), (0, -math.inf))}, {1: 0.5 / 0.95, 2: 0.25 / 0.95, 3: 0.2 / 0.95}),
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
    samples = [
        make_sample(0.7 * (n % 3), top_p=0.9, seed=n, position=2 * n, **({}, {"top_k": 5, "bias": ((n, 2.0),)})[n % 2])
        for n in range(6)
    ]
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


def test_bias_moves_the_greedy_token_and_not_its_log_probability():
    logits = logits_of(0.2, 0.5, 0.3).expand(3, -1)
    samples = [
        make_sample(temperature=0.0, bias=((2, 1.0),)),
        make_sample(0.0, bias=((1, -100.0), (2, -100.0))),
        make_sample(0.0),
    ]
    found = pairs(logits, samples)
    assert [token for token, _ in found] == [2, 0, 1]
    assert [log_prob for _, log_prob in found] == pytest.approx([math.log(p) for p in (0.3, 0.2, 0.5)], abs=1e-6)
    assert logits.tolist() == logits_of(0.2, 0.5, 0.3).expand(3, -1).tolist(), "the input stays"


def read_all(logits, samples):
    return Unread(4, *sample(logits, samples), logits.new_zeros(2), list_top(logits, samples)).read()


def test_likeliest_tokens_are_those_of_log_softmax_before_all_filters():
    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(3))
    samples = [
        make_sample(0.0, num_top=3, bias=((1, 5.0),)),
        make_sample(),
        make_sample(temperature=0.2, num_top=1, top_k=1),
        make_sample(num_top=99),
    ]
    output = read_all(logits, samples)
    wanted = torch.log_softmax(logits, -1)
    assert [index for index, _ in output.tops] == [0, 2, 3]
    for index, top in output.tops:
        order = wanted[index].argsort(descending=True).tolist()[: min(30, samples[index].filters.num_top)]
        assert [token for token, _ in top] == order
        assert [value for _, value in top] == pytest.approx([float(wanted[index, token]) for token in order], abs=1e-6)
    assert list(output.tokens) == pairs(logits, samples)
    assert list(output.log_probs) == [0.0, 0.0]


def test_no_likeliest_tokens_without_a_wish():
    logits = torch.zeros(2, 5)
    output = read_all(logits, [make_sample(), make_sample(top_k=3)])
    assert (list(output.tops), len(output.tokens)) == ([], 2)


def test_scores_of_given_tokens_are_log_softmax():
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(1))
    targets = torch.tensor([0, 29, 7, 7, 3])
    expected = torch.log_softmax(logits, -1)[torch.arange(5), targets].tolist()
    assert choice_log_probs(logits, targets).tolist() == pytest.approx(expected, abs=1e-6)
    assert choice_log_probs(logits[:0], targets[:0]).tolist() == []
    assert pairs(logits[:0], []) == []
