"""Metrics against hand-computed cases, scikit-learn and published interval values."""

from __future__ import annotations

import dataclasses
import math
import random
from decimal import Decimal

import numpy as np
import pytest
from sklearn.metrics import f1_score

from finlora.data.example import Example
from finlora.evaluate.intervals import (
    accuracy_interval,
    weighted_f1_interval,
    weighted_f1_of_tables,
    wilson_interval,
)
from finlora.evaluate.metrics import (
    UNPARSABLE,
    confusion,
    contained_accuracy,
    is_near,
    is_number,
    normalise_free_text,
    parse_label,
    score_answers,
    score_segments,
    strict_accuracy,
    weighted_f1,
)

SENTIMENT = ("negative", "neutral", "positive")
SEVEN = tuple(f"{grade}{side}" for side in ("negative", "positive") for grade in ("", "mildly ", "moderately "))


def make_example(number: int, label: str, choices=SENTIMENT, answer=None, group=None) -> Example:
    return Example(
        id=f"fpb-test-{number}",
        task="fpb",
        prompt="What is the sentiment?",
        answer=label if answer is None else answer,
        label=label,
        choices=choices,
        source=f"made-up:{number}",
        group=f"sentence {number}" if group is None else group,
    )


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("positive", "positive"),
        ("  Positive.\n", "positive"),
        ("The sentiment is NEGATIVE, clearly", "negative"),
        ("Positive. The negative news is old.", "positive"),
        ("positive\nnegative", "positive"),
        ("positive positive", "positive"),
        ("positive or negative", None),
        ("not negative but positive", "positive"),
        ("It isn't positive", None),
        ("positively", None),
        ("nonpositive", None),
        ("", None),
        ("I cannot say", None),
    ],
)
def test_parse_label_reads_first_stated_choice(answer, expected):
    assert parse_label(answer, SENTIMENT) == expected


def test_parse_label_prefers_longest_choice():
    choices = ("positive", "mildly positive", "neutral")
    assert parse_label("Mildly  positive", choices) == "mildly positive"
    assert parse_label("positive", choices) == "positive"
    assert parse_label("mildly positive, or even positive", choices) is None


def test_parse_label_matches_signs_in_choices_literally():
    assert parse_label("it went up (a lot).", ("up (a lot)", "down")) == "up (a lot)"
    assert parse_label("the U.S. market", ("U.S.", "U.K.")) == "U.S."
    assert parse_label("anything", ("", "x")) is None


def test_contained_accuracy_follows_the_paper():
    assert contained_accuracy(["Mildly Positive!", "unknown", "down"], ["positive ", "no", "up"]) == pytest.approx(
        2 / 3
    )
    assert contained_accuracy(["anything"], [""]) == 0.0
    assert math.isnan(contained_accuracy([], []))


def test_strict_accuracy_counts_unparsable_as_wrong():
    assert strict_accuracy(["up", None, "up", "down"], ["up", "up", "down", "down"]) == 0.5


def test_weighted_f1_equals_hand_computed_case():
    # Truth a, a, a, b. For a: 2 true positives, 0 false ones, 1 missed (unparsable), F1 0.8. For b: all right, F1 1.
    assert weighted_f1(["a", "a", None, "b"], ["a", "a", "a", "b"], ["a", "b"]) == pytest.approx(
        0.75 * 0.8 + 0.25 * 1.0
    )
    # Dropping the unparsable answer would give 1.0.
    assert weighted_f1([None, None], ["a", "b"]) == 0.0
    assert math.isnan(weighted_f1([], []))


def test_weighted_f1_equals_scikit_learn_and_table_formula():
    generator = random.Random(1)
    labels = [generator.choice("abc") for _ in range(500)]
    predictions = [generator.choice(["a", "b", "c", "d", None]) for _ in range(500)]
    direct = f1_score(labels, [p or "?" for p in predictions], average="weighted", labels=["a", "b", "c"])
    table = np.zeros((1, 3, 4), dtype=np.int64)
    for prediction, label in zip(predictions, labels, strict=True):
        table[0, "abc".index(label), "abc".find(prediction) if prediction in ("a", "b", "c") else 3] += 1
    assert weighted_f1(predictions, labels, "abc") == pytest.approx(direct)
    assert weighted_f1_of_tables(table)[0] == pytest.approx(direct)


def test_weighted_f1_refuses_unfolded_label_and_wrong_length():
    with pytest.raises(ValueError, match="fold the labels first"):
        weighted_f1(["positive"], ["mildly positive"], SENTIMENT)
    with pytest.raises(ValueError, match="1 predictions for 2 labels"):
        weighted_f1(["a"], ["a", "b"])


def test_confusion_counts_unparsable_in_own_column():
    counts = confusion(["a", None, "b", "a"], ["a", "a", "b", "b"])
    assert counts == {"a": {"a": 1, UNPARSABLE: 1}, "b": {"a": 1, "b": 1}}


def test_wilson_interval_equals_published_values():
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson_interval(1, 29) == pytest.approx((0.0061, 0.1718), abs=5e-5)
    assert all(math.isnan(bound) for bound in wilson_interval(0, 0))


def test_accuracy_interval_of_single_items_is_wilson():
    flags = [True] * 30 + [False] * 10
    assert accuracy_interval(flags) == wilson_interval(30, 40)
    assert accuracy_interval(flags, [str(number) for number in range(40)]) == wilson_interval(30, 40)


def test_accuracy_interval_of_clusters_is_wider():
    # 50 groups of 17 copies: the true sample size is 50, so the interval must be that of 50 items, not of 850.
    flags = [number < 35 for number in range(50) for _ in range(17)]
    groups = [str(number) for number in range(50) for _ in range(17)]
    low, high = accuracy_interval(flags, groups)
    expected_low, expected_high = wilson_interval(35, 50)
    assert high - low == pytest.approx(expected_high - expected_low, rel=0.15)
    assert high - low > 3 * (accuracy_interval(flags)[1] - accuracy_interval(flags)[0])
    assert accuracy_interval(flags, groups) == (low, high)


def test_accuracy_interval_of_perfect_clusters_counts_groups():
    assert accuracy_interval([True] * 34, ["x"] * 17 + ["y"] * 17) == wilson_interval(2, 2)
    assert accuracy_interval([True, False], ["x", "x"]) == wilson_interval(0.5, 1)
    with pytest.raises(ValueError, match="2 groups for 1 items"):
        accuracy_interval([True], ["x", "y"])


def test_weighted_f1_interval_covers_value_and_widens_with_clusters():
    generator = random.Random(2)
    labels = [generator.choice(SENTIMENT) for _ in range(60)]
    predictions = [label if generator.random() < 0.7 else generator.choice([None, *SENTIMENT]) for label in labels]
    labels, predictions = labels * 17, predictions * 17
    groups = [str(number % 60) for number in range(len(labels))]
    value = weighted_f1(predictions, labels)
    low, high = weighted_f1_interval(predictions, labels)
    wide_low, wide_high = weighted_f1_interval(predictions, labels, groups)
    assert wide_low < low < value < high < wide_high
    assert wide_high - wide_low == pytest.approx(math.sqrt(17) * (high - low), rel=0.2)
    assert weighted_f1_interval(predictions, labels, groups) == (wide_low, wide_high)
    assert all(math.isnan(bound) for bound in weighted_f1_interval([], []))


def test_bootstrap_in_blocks_equals_one_block(monkeypatch):
    labels, groups = ["a", "b"] * 20, [str(number // 4) for number in range(40)]
    whole = weighted_f1_interval(["a"] * 40, labels, groups)
    monkeypatch.setattr("finlora.evaluate.intervals._BLOCK_CELLS", 1000)
    assert weighted_f1_interval(["a"] * 40, labels, groups) == whole


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("$1,234.0", "1234"),
        (" 1234 ", "1234"),
        ("-5,000,000.50", "-5000000.5"),
        ("$ 0.00", "0"),
        ("1e5", "1e5"),
        ("100", "100"),
        ("us-gaap:NetIncomeLoss", "netincomeloss"),
        ("NetIncomeLoss.", "netincomeloss"),
        ("5.0%", "5.0%"),
        ("12,34", "12,34"),
        ("", ""),
        (".", ""),
        ("$", "$"),
    ],
)
def test_normalise_free_text_normalises_numbers_and_tags(text, normal):
    assert normalise_free_text(text) == normal


def test_score_answers_returns_the_documented_keys():
    examples = [make_example(0, "positive"), make_example(1, "negative"), make_example(2, "neutral")]
    metrics, counts = score_answers(["Positive", "positive or negative", "neutral."], examples)
    scores = ("accuracy", "strict_accuracy", "weighted_f1")
    assert set(metrics) == {f"{name}{end}" for name in scores for end in ("", "_low", "_high")} | {"unparsable"}
    assert metrics["accuracy"] == 1.0
    assert metrics["strict_accuracy"] == pytest.approx(2 / 3)
    assert metrics["unparsable"] == 1.0
    assert counts["negative"] == {UNPARSABLE: 1}
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == wilson_interval(3, 3)


def test_score_answers_folds_choices_to_labels():
    examples = [make_example(0, "positive", SEVEN, "mildly positive"), make_example(1, "negative", SEVEN, "negative")]
    metrics, counts = score_answers(["moderately positive", "mildly negative"], examples)
    assert metrics["strict_accuracy"] == 1.0
    assert metrics["weighted_f1"] == 1.0
    assert counts == {"negative": {"negative": 1}, "positive": {"positive": 1}}
    folded = score_answers(["mildly negative"] * 2, examples, fold={"mildly negative": "positive"})
    assert folded.confusion == {"negative": {"positive": 1}, "positive": {"positive": 1}}


def test_score_answers_of_free_text_has_no_classes():
    examples = [make_example(n, label, ()) for n, label in enumerate(["1234", "us-gaap:Assets", "77"])]
    metrics, counts = score_answers(["$1,234.0", "Assets", ""], examples)
    assert counts == {}
    assert "weighted_f1" not in metrics
    assert metrics["accuracy"] == 0.0
    assert metrics["strict_accuracy"] == pytest.approx(2 / 3)
    assert metrics["unparsable"] == 1.0


def test_score_answers_clusters_paraphrases():
    examples = [make_example(n, "positive", group=f"pair {n // 17}") for n in range(34)]
    metrics, _ = score_answers(["positive"] * 34, examples)
    assert metrics["accuracy_low"] == wilson_interval(2, 2)[0]


def test_score_answers_refuses_missing_answers():
    with pytest.raises(ValueError, match="0 answers for 1 examples"):
        score_answers([], [make_example(0, "positive")])
    with pytest.raises(ValueError, match="at least one"):
        score_answers([], [])


def test_score_answers_of_a_mixed_set_has_f1_of_the_classes_only():
    examples = [make_example(0, "positive"), make_example(1, "1,234", ()), make_example(2, "negative")]
    metrics, counts = score_answers(["positive", "$1234", "none"], examples)
    assert metrics["strict_accuracy"] == pytest.approx(2 / 3)
    assert metrics["weighted_f1"] == 0.5
    assert counts == {"negative": {UNPARSABLE: 1}, "positive": {"positive": 1}}


@pytest.mark.parametrize(
    ("answer", "label", "expected"),
    [
        ("33.3", "33.3", True),
        ("33.6", "33.3", True),  # 0.9 % off
        ("33.7", "33.3", False),  # 1.2 % off
        ("$1,240.00", "1234", True),
        ("33.3 %", "33.3", True),
        ("-97", "-97", True),
        ("97", "-97", False),
        ("\u221297", "-97", True),
        ("(120 - 80) / 120 = 0.33", "0.33", True),
        ("0.33\nThe value of 2020 was 7", "0.33", True),
        ("1.2 billion", "1200000000", False),
        ("0", "0.0", True),
        ("0.01", "0", False),
        ("about a third", "0.33", False),
        ("", "1", False),
    ],
)
def test_number_near_the_truth(answer, label, expected):
    assert is_near(answer, label) == expected


def test_labels_that_are_numbers():
    assert [is_number(text) for text in ("1,234", "-0.5", "$ 7", "us-gaap:Assets", "5 %", "")] == [True] * 3 + [
        False
    ] * 3


def test_numeric_accuracy_is_over_the_numbers_only():
    examples = [make_example(n, label, ()) for n, label in enumerate(["100", "us-gaap:Assets", "200"])]
    examples.append(make_example(3, "positive"))
    metrics, _ = score_answers(["100.9", "Assets", "250", "positive"], examples)
    assert metrics["numeric_accuracy"] == 0.5
    assert (metrics["numeric_accuracy_low"], metrics["numeric_accuracy_high"]) == wilson_interval(1, 2)
    assert "numeric_accuracy" not in score_answers(["positive"], examples[3:]).metrics


def test_number_is_judged_by_the_tasks_own_tolerance():
    example = Example(id="a", task="n", prompt="p", answer="100", label="100", choices=(), source="s", group="g")
    for tolerance, right in (("0.005", 0.0), ("0.02", 1.0)):
        scores = score_answers(["101"], [example], tolerance=Decimal(tolerance))
        assert scores.metrics["numeric_accuracy"] == right


def test_label_that_contains_another_is_not_that_label():
    """Without `is_exact` NWGI's "mildly positive" counts for "positive"."""
    parts = {"task": "t", "prompt": "p", "source": "s", "choices": ("bad", "very bad")}
    examples = [Example(id=str(n), answer="bad", label="bad", group=str(n), **parts) for n in range(2)]
    exact, folded = (score_answers(["bad", "very bad"], examples, is_exact=own).metrics for own in (True, False))
    assert (exact["accuracy"], exact["strict_accuracy"]) == (0.5, 0.5)
    assert (folded["accuracy"], folded["strict_accuracy"]) == (1.0, 1.0)


def test_each_label_of_a_multi_label_task_has_precision_and_recall_of_yes():
    rows = {
        "fraud": [("Yes", "Yes"), ("Yes", "No"), ("No", "Yes"), ("No", "No")],
        "rare": [("Yes", "No")] + [("No", "No")] * 9,
    }
    examples, answers = [], []
    for name, pairs in rows.items():
        for truth, answer in pairs:
            example = make_example(len(examples), truth, choices=("Yes", "No"))
            examples.append(dataclasses.replace(example, segments=(name,)))
            answers.append(answer)
    found = score_segments(answers, examples, ("topic",), seed=0, tolerance=Decimal(0))["topic"]
    names = ("accuracy", "yes_precision", "yes_recall", "yes_f1")
    assert [found["fraud"][name] for name in names] == [0.5, 0.5, 0.5, 0.5]
    assert [found["rare"][name] for name in names] == [0.9, 0, 0, 0]  # right 9 times of 10, and never names it
    other = [dataclasses.replace(make_example(0, "negative"), segments=("x",))]
    assert "yes_f1" not in score_segments(["negative"], other, ("topic",), seed=0, tolerance=Decimal(0))["topic"]["x"]
