"""Verdicts in words and numbers: better, worse, not shown to differ, and what could not be compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from carded import make_run, make_table
from made_results import make_evaluation

from finlora.card.evidence import Scored, collect_evidence
from finlora.card.outcome_parts import describe_abstention, describe_calibration, describe_confusion, describe_scores
from finlora.card.verdict import compare_with_base, compare_with_majority, write_verdict

COUNTS = {"bad": {"bad": 50, "good": 10}, "good": {"bad": 5, "good": 35}}


def make_scored(result, base=None, table=None, base_table=None):
    place = Path("results.jsonl")
    return Scored(
        result=result,
        source=place,
        table=table,
        why_no_table="",
        base=base,
        base_source=place,
        base_table=base_table,
    )


def with_interval(value, low, high, **changes):
    metrics = {"accuracy": value, "accuracy_low": low, "accuracy_high": high}
    return make_evaluation(metrics=metrics, num_examples=100, **changes)


@pytest.mark.parametrize(
    ("own", "base", "word"),
    [
        ((0.85, 0.8, 0.9), (0.6, 0.5, 0.7), "better than"),
        ((0.6, 0.5, 0.7), (0.85, 0.8, 0.9), "worse than"),
        ((0.65, 0.55, 0.75), (0.6, 0.5, 0.7), "not shown to differ from"),
    ],
)
def test_base_is_beaten_where_the_interval_of_the_difference_leaves_zero_out(own, base, word):
    gain = compare_with_base(make_scored(with_interval(*own), with_interval(*base, variant="base")), 1)
    assert gain.word == word
    assert gain.gain == pytest.approx(own[0] - base[0])
    assert not gain.is_paired


def test_answers_of_both_make_a_paired_comparison():
    """40 answers right together, 5 by the adapter alone: unpaired that is nothing, paired it is a gain."""
    flags, others = [True] * 45 + [False] * 55, [True] * 40 + [False] * 60
    own, base = with_interval(0.45, 0.35, 0.55), with_interval(0.4, 0.3, 0.5, variant="base")
    paired = compare_with_base(make_scored(own, base, make_table(flags), make_table(others)), 1)
    assert (paired.is_paired, paired.word) == (True, "better than")
    assert compare_with_base(make_scored(own, base), 1).word == "not shown to differ from"
    shuffled = make_table(others, id=[f"other {row}" for row in range(100)])
    assert not compare_with_base(make_scored(own, base, make_table(flags), shuffled), 1).is_paired


def test_majority_is_the_most_frequent_label_of_the_test_split():
    own = with_interval(0.85, 0.77, 0.91, counts=COUNTS)
    gain = compare_with_majority(make_scored(own), 1)
    assert (gain.other, gain.accuracy, gain.word) == ("always answering bad", 0.6, "better than")
    labels = ["bad"] * 60 + ["good"] * 40
    table = make_table([True] * 50 + [False] * 10 + [True] * 35 + [False] * 5, label=labels)
    paired = compare_with_majority(make_scored(own, table=table), 1)
    assert paired.is_paired
    assert paired.gain_low < 0.25 < paired.gain_high
    assert compare_with_majority(make_scored(with_interval(0.5, 0.4, 0.6)), 1) is None  # free text


def test_verdict_is_one_sentence_with_every_interval(tmp_path):
    (sentence,) = write_verdict(collect_evidence(make_run(tmp_path)))
    assert sentence.startswith(
        "letters, 8 bit, by labels: right in 75.0 % of 40 test examples (95 % interval 59.8 to 85.8), better than its base "
        "(50.0 %; difference +25.0 points, +12.5 to "
    )
    assert ", and better than always answering " in sentence
    assert sentence.endswith(".")


def test_trial_of_a_search_was_not_scored_on_the_test_split(tmp_path):
    adapter = make_run(tmp_path)
    (tmp_path / "search.yaml").touch()
    evidence = collect_evidence(adapter)
    assert "of 40 examples that a search held out from the training split (95 %" in write_verdict(evidence)[0]
    assert describe_scores(evidence).gaps == (
        "letters, 8 bit, by labels: scores on the test split: a search held these examples out from the training split",
    )


def test_verdict_says_what_could_not_be_compared(tmp_path):
    adapter = make_run(tmp_path)
    results = adapter.parent / "results.jsonl"
    lines = results.read_text().splitlines(keepends=True)
    results.write_text("".join([lines[0], lines[2]]))
    (sentence,) = write_verdict(collect_evidence(adapter))
    assert "its base was not scored on the same questions, so no gain is shown" in sentence
    results.write_text(lines[0])
    (sentence,) = write_verdict(collect_evidence(adapter))
    assert sentence.startswith(
        f"Not evaluated: {adapter.parent} holds no score of exactly these weights. Run `finlora evaluate`"
    )


def test_free_text_without_probabilities_is_no_open_point(tmp_path):
    """A label that was generated could have been scored; free text cannot be, so that nobody can close such a point."""
    evidence = collect_evidence(make_run(tmp_path))
    free, label = (
        dataclasses.replace(
            evidence, scored=(make_scored(with_interval(0.5, 0.4, 0.6, method="generate", counts=counts)),)
        )
        for counts in ({}, COUNTS)
    )
    for describe in (describe_confusion, describe_calibration, describe_abstention):
        part = describe(free)
        assert (part.gaps, len(part.blocks)) == ((), 1)
        assert "answers are free text" in str(part.blocks[0])
    assert describe_confusion(label).gaps == ()
    for describe in (describe_calibration, describe_abstention):
        assert "eval.method=labels" in describe(label).gaps[0]
