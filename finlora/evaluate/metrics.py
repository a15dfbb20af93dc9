"""Scores of generated answers: the paper's accuracy, strict accuracy and weighted F1, with 95 % intervals. No torch.

Accuracy is the paper's: the answer contains the ground truth. It is generous ("unknown" contains "no"), so strict accuracy
is reported too: the parsed answer equals the label. Where labels are numbers, numeric accuracy is the share of answers within
NUMERIC_TOLERANCE of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

from finlora.data.example import Example
from finlora.data.prompts import YES_NO
from finlora.evaluate.intervals import accuracy_interval, weighted_f1_interval

UNPARSABLE = "(none)"
"""Column of the confusion counts for answers that state no allowed choice."""

NUMERIC_TOLERANCE = Decimal("0.01")
"""Relative distance to the label within which a number counts as right for numeric accuracy."""

MAX_SEGMENTS = 50
"""Values of a segment column that are scored, the most frequent ones."""

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)|[\n;]")
_NEGATION = re.compile(r"(?:\b(?:not|never|neither|nor|cannot)|n['’]t)(?:\s+(?:an?|the|be|really|clearly))*\s+$")
_NUMBER = re.compile(r"-?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?")
_STATED_NUMBER = re.compile(r"(?<![\w.])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\w])")


class Scores(NamedTuple):
    """Scores of an evaluation, as `results.Result` stores them: `metrics`, and the confusion as `counts`."""

    metrics: dict[str, float]
    confusion: dict[str, dict[str, int]]


def parse_label(answer: str, choices: Sequence[str]) -> str | None:
    """Return the one allowed choice that an answer states; None where it states none or more than one.

    Case is ignored, and a choice must appear as whole words. Of overlapping choices the longest counts ("mildly
    positive", not "positive"). Directly negated choices ("not negative") do not count. Only the first sentence that states a
    choice counts: "Positive. The negative news is old." is positive. "positive or negative" is unparsable: the order of
    words must not decide the score of an undecided answer.
    """
    text = answer.lower()
    spans: list[tuple[int, int, str]] = []
    for choice in sorted(choices, key=len, reverse=True):
        words = r"\s+".join(re.escape(word) for word in choice.lower().split())
        if not words:
            continue
        for match in re.finditer(rf"(?<!\w){words}(?!\w)", text):
            if not any(start < match.end() and match.start() < end for start, end, _ in spans):
                spans.append((match.start(), match.end(), choice))
    stated = sorted(span for span in spans if not _NEGATION.search(text[: span[0]]))
    if not stated:
        return None
    end_of_sentence = _SENTENCE_END.search(text, stated[0][1])
    limit = end_of_sentence.start() if end_of_sentence else len(text)
    found = {choice for start, _, choice in stated if start < limit}
    return found.pop() if len(found) == 1 else None


def normalise_free_text(text: str) -> str:
    """Return a free-text answer in the form that strict accuracy compares.

    Case, outer white space and one closing full stop are dropped. Numbers lose `$`, thousands commas and trailing
    zeros of the fraction ("$1,234.0" becomes "1234"); tags lose an optional "us-gaap:" prefix. Scale words and
    per cent signs stay: a value in millions is a different value.
    """
    plain = " ".join(text.split()).lower().removesuffix(".")
    plain = plain.removeprefix("us-gaap:").strip()
    number = plain.replace("$", "").replace(" ", "")
    if any(digit.isdigit() for digit in number) and _NUMBER.fullmatch(number):
        value = Decimal(number.replace(",", ""))
        return f"{value.normalize():f}" if value else "0"
    return plain


def is_number(text: str) -> bool:
    """Return whether a label is a number and nothing else."""
    plain = normalise_free_text(text)
    return any(character.isdigit() for character in plain) and _NUMBER.fullmatch(plain) is not None


def is_near(answer: str, label: str, tolerance: Decimal = NUMERIC_TOLERANCE) -> bool:
    """Return whether the last number of the answer's first line lies within a relative tolerance of the label.

    It is the last one, since an answer may show its working: "(120 - 80) / 120 = 0.33". Currency and per cent signs are
    ignored, thousands commas understood. Scale words are not read: a value in millions is a different value.

    Args:
        label: a number, by `is_number`.
    """
    lines = answer.replace("\N{MINUS SIGN}", "-").strip().splitlines()
    found = _STATED_NUMBER.findall(lines[0]) if lines else []
    if not found:
        return False
    truth = Decimal(normalise_free_text(label))
    return abs(Decimal(found[-1].replace(",", "")) - truth) <= tolerance * abs(truth)


def contained_accuracy(answers: Sequence[str], labels: Sequence[str]) -> float:
    """Return the paper's accuracy: the share of answers that contain their label, ignoring case; nan without items."""
    return _mean([is_contained(answer, label) for answer, label in zip(answers, labels, strict=True)])


def strict_accuracy(predictions: Sequence[str | None], labels: Sequence[str]) -> float:
    """Return the share of parsed predictions equal to their label; None is wrong; nan without items."""
    return _mean([prediction == label for prediction, label in zip(predictions, labels, strict=True)])


def is_contained(answer: str, label: str) -> bool:
    """Return whether the answer contains the label, both lower-cased and stripped. No answer contains an empty label."""
    wanted = label.strip().lower()
    return bool(wanted) and wanted in answer.strip().lower()


def weighted_f1(
    predictions: Sequence[str | None], labels: Sequence[str], classes: Sequence[str] | None = None
) -> float:
    """Return scikit-learn's weighted F1 over the classes present in the truth; nan without items.

    Args:
        predictions: parsed predictions; None counts as a wrong prediction and is never dropped.
        labels: the truth.
        classes: the allowed labels, used only to refuse labels outside them. The weights are the supports, so a class without
            test items cannot change the score.

    Raises:
        ValueError: a label is not among `classes`; the caller did not fold it.
    """
    present = sorted(set(labels))
    unknown = sorted(set(present) - set(present if classes is None else classes))
    if unknown:
        raise ValueError(f"labels {unknown} are not among the classes {list(classes or ())}: fold the labels first")
    if len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels: expected one each")
    if not labels:
        return math.nan
    from sklearn.metrics import f1_score  # a second to import

    marked = [UNPARSABLE if prediction is None else prediction for prediction in predictions]
    return float(f1_score(list(labels), marked, labels=present, average="weighted", zero_division=0.0))


def confusion(predictions: Sequence[str | None], labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return label -> prediction -> number of items, keys sorted; unparsable predictions count under "(none)"."""
    counts: dict[str, dict[str, int]] = {label: {} for label in sorted(set(labels))}
    pairs = zip((UNPARSABLE if p is None else p for p in predictions), labels, strict=True)
    for prediction, label in sorted(pairs):
        counts[label][prediction] = counts[label].get(prediction, 0) + 1
    return counts


def score_answers(
    answers: Sequence[str],
    examples: Sequence[Example],
    *,
    fold: Mapping[str, str] | None = None,
    seed: int = 0,
    tolerance: Decimal = NUMERIC_TOLERANCE,
    is_exact: bool = False,
) -> Scores:
    """Score the answers to one task's examples.

    Args:
        answers: generated text, or the choice of label scoring; one for each example, in order.
        examples: test examples of one task. `group` clusters the intervals; one without `choices` is free text.
        fold: choice -> label where they differ (NWGI: "mildly positive" -> "positive"). None: taken from the examples'
            (answer, label) pairs; a choice that is no example's answer maps to the one label that it contains as words.
        seed: of the bootstrap.
        tolerance: relative distance within which a number counts as right.
        is_exact: an answer that is another allowed choice is wrong though it contains the label ("very bad" for "bad"), and no
            choice is folded: the labels are a user's own.

    Returns:
        metrics with the keys that `results.Result.metrics` documents, each score in 0..1 with `_low` and `_high`, and
        `unparsable`, the number of answers without a prediction. Free text has no classes: strict accuracy compares
        normalised texts, only empty answers are unparsable, and weighted F1 and confusion cover the closed-label
        examples alone; both are absent where there are none. So is numeric accuracy where no free-text label is a number.

    Raises:
        ValueError: no examples, or not one answer for each.
    """
    if not examples or len(answers) != len(examples):
        raise ValueError(f"{len(answers)} answers for {len(examples)} examples: expected one each, and at least one")
    folding = dict(fold or {}) if fold is not None or is_exact else _read_folding(examples)
    predictions: list[str | None] = []
    truths: list[str] = []
    for answer, example in zip(answers, examples, strict=True):
        if example.choices:
            choice = parse_label(answer, example.choices)
            predictions.append(None if choice is None else folding.get(choice, choice))
            truths.append(example.label)
        else:
            predictions.append(normalise_free_text(answer) or None)
            truths.append(normalise_free_text(example.label))
    groups = [example.group for example in examples]
    labels = [example.label for example in examples]
    contained = judge_answers(answers, examples, is_exact=is_exact)
    strict = [prediction == truth for prediction, truth in zip(predictions, truths, strict=True)]
    metrics: dict[str, float] = {"unparsable": float(predictions.count(None))}
    _put(metrics, "accuracy", _mean(contained), accuracy_interval(contained, groups, seed=seed))
    _put(metrics, "strict_accuracy", strict_accuracy(predictions, truths), accuracy_interval(strict, groups, seed=seed))
    numeric = [index for index, label in enumerate(labels) if not examples[index].choices and is_number(label)]
    if numeric:
        near = [is_near(answers[index], labels[index], tolerance) for index in numeric]
        own = accuracy_interval(near, [groups[index] for index in numeric], seed=seed)
        _put(metrics, "numeric_accuracy", _mean(near), own)
    closed = [index for index, example in enumerate(examples) if example.choices]
    if not closed:
        return Scores(metrics, {})
    predictions = [predictions[index] for index in closed]
    truths = [truths[index] for index in closed]
    groups = [groups[index] for index in closed]
    interval = weighted_f1_interval(predictions, truths, groups, seed=seed)
    _put(metrics, "weighted_f1", weighted_f1(predictions, truths), interval)
    return Scores(metrics, confusion(predictions, truths))


def judge_answers(answers: Sequence[str], examples: Sequence[Example], *, is_exact: bool = False) -> list[bool]:
    """Return whether each answer counts as right for the paper's accuracy: it contains the truth.

    Args:
        is_exact: as in `score_answers`.
    """
    return [
        answer == example.label if is_exact and answer in example.choices else is_contained(answer, example.label)
        for answer, example in zip(answers, examples, strict=True)
    ]


def score_segments(
    answers: Sequence[str], examples: Sequence[Example], names: Sequence[str], *, seed: int, tolerance: Decimal
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the scores of each segment: column -> value -> metrics, with the number of its examples as `count`.

    Args:
        names: columns of the examples' `segments`. Of each the MAX_SEGMENTS most frequent values are scored. Where all its
            questions are answered with Yes or No, a segment also has precision, recall and F1 of Yes: of a label that few rows
            have, the other scores are near 100 % for a model that never names it.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for position, name in enumerate(names):
        by_value: dict[str, list[int]] = {}
        for index, example in enumerate(examples):
            by_value.setdefault(example.segments[position], []).append(index)
        ranked = sorted(by_value.items(), key=lambda pair: (-len(pair[1]), pair[0]))[:MAX_SEGMENTS]
        found[name] = {}
        for value, indices in ranked:
            own = [answers[index] for index in indices]
            rows = [examples[index] for index in indices]
            scores = score_answers(own, rows, seed=seed, tolerance=tolerance, is_exact=True)
            found[name][value] = {"count": float(len(indices)), **scores.metrics, **_score_yes(own, rows)}
    return found


def _score_yes(answers: Sequence[str], examples: Sequence[Example]) -> dict[str, float]:
    """Return precision, recall and F1 of Yes, 0 where there is nothing to divide by; empty if other answers are allowed."""
    if any(example.choices != YES_NO for example in examples):
        return {}
    from sklearn.metrics import precision_recall_fscore_support  # a second to import

    truths = [example.label == YES_NO[0] for example in examples]
    predictions = [parse_label(answer, YES_NO) == YES_NO[0] for answer in answers]
    scores = precision_recall_fscore_support(truths, predictions, average="binary", zero_division=0.0)
    return {f"yes_{name}": float(score) for name, score in zip(("precision", "recall", "f1"), scores, strict=False)}


def _put(metrics: dict[str, float], name: str, value: float, interval: tuple[float, float]) -> None:
    metrics[name], metrics[f"{name}_low"], metrics[f"{name}_high"] = value, *interval


def _read_folding(examples: Sequence[Example]) -> dict[str, str]:
    """Return choice -> label for every choice, as `score_answers` documents."""
    closed = [example for example in examples if example.choices]
    labels = sorted({example.label for example in closed})
    folding = {example.answer: example.label for example in closed} | {label: label for label in labels}
    for choice in {choice for example in closed for choice in example.choices} - folding.keys():
        folding[choice] = parse_label(choice, labels) or choice
    return folding


def _mean(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else math.nan
