"""Monitor of labels: counters, window, caps, and what it says without a reference, against sums over the same answers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from finlora.evaluate.calibration import calibrate_top
from finlora.evaluate.reference import Reference
from finlora.evaluate.stability import chance_index, stability_index
from finlora.serve.accounts import label_monitor
from finlora.serve.accounts.label_monitor import LEAST, MAX_LABELS, OTHER, WINDOW, LabelMonitor, Watched

CHOICES = ("bad", "good", "neutral")
REFERENCE = Reference(
    task="letters",
    bits=8,
    is_partial=False,
    data_hash="d",
    created="2026-01-01",
    choices=list(CHOICES),
    answers=[100, 60, 40],
    truths=[90, 70, 40],
    accuracy=0.9,
    temperature=2.0,
    num_fitted=200,
    estimated_accuracy=0.89,
    below=[2 * edge for edge in range(101)],
)
LETTERS = Watched("tone", "v1", "letters")


@dataclass
class Adapter:
    """Stands for a ServedAdapter."""

    name: str = "tone"
    version: str | None = "v1"
    hash: str = "h"
    references: tuple[Reference, ...] = (REFERENCE,)


class Meter:
    def __init__(self):
        self.counted, self.references, self.windows = [], {}, {}

    def count_label(self, watched, label, probability, calibrated, *, is_abstained):
        self.counted.append((watched, label, probability, calibrated, is_abstained))

    def show_reference(self, watched, reference, shares):
        self.references[watched] = (reference, shares)

    def show_window(self, watched, figures):
        self.windows[watched] = figures


@pytest.fixture
def meter():
    return Meter()


@pytest.fixture
def due():
    """Updates of gauges that wait for their second to pass."""
    return []


@pytest.fixture
def monitor(meter, due):
    return LabelMonitor(meter, 8, lambda _seconds, function: due.append(function))


def answer(monitor, number, label="bad", top=0.8, adapter=None, threshold=0.0, task="letters", choices=CHOICES):
    others = [choice for choice in choices if choice != label]
    probabilities = {label: top} | dict.fromkeys(others, (1 - top) / len(others))
    for _ in range(number):
        monitor.count(adapter, task, choices, probabilities, threshold)


def test_window_agrees_with_sums_over_its_answers(monitor, meter, due):
    adapter = Adapter()
    answer(monitor, 50, "good", 0.99, adapter)  # pushed out of the window
    answer(monitor, 400, "bad", 0.8, adapter, threshold=0.9)
    answer(monitor, 350, "good", 0.6, adapter, threshold=0.5)
    answer(monitor, 250, "neutral", 0.7, adapter)
    assert len(due) == 1  # one update a second, however many answers
    due.pop()()
    figures = meter.windows[LETTERS]
    tops = [0.8] * 400 + [0.6] * 350 + [0.7] * 250
    calibrated = [calibrate_top([top, (1 - top) / 2, (1 - top) / 2], 2.0) for top in tops]
    assert figures.num_answers == WINDOW == 1000
    assert figures.abstention == 0.4
    assert figures.tested_abstention == pytest.approx((400 * 180 + 350 * 100) / 200 / 1000)
    assert figures.estimated_accuracy == pytest.approx(sum(calibrated) / 1000)
    assert figures.stability_index == pytest.approx(stability_index([100, 60, 40], [400, 350, 250]))
    assert figures.chance_index == pytest.approx(chance_index(200, 1000, 3))
    assert meter.references[LETTERS] == (REFERENCE, {"bad": 0.5, "good": 0.3, "neutral": 0.2})
    assert len(meter.counted) == 1050
    assert meter.counted[60][:3] == (LETTERS, "bad", 0.8)
    assert [each[4] for each in meter.counted].count(True) == 400
    answer(monitor, 1, adapter=adapter)
    assert len(due) == 1


def test_few_answers_and_no_reference_have_no_index_instead_of_0(monitor, meter, due):
    answer(monitor, LEAST - 1, adapter=Adapter())
    answer(monitor, LEAST, top=0.4, threshold=0.5, task="fpb")
    for update in due:
        update()
    assert meter.windows[LETTERS].num_answers == LEAST - 1
    assert meter.windows[LETTERS].stability_index is meter.windows[LETTERS].abstention is None
    alone = meter.windows[Watched("base", "", "fpb")]
    assert (alone.num_answers, alone.abstention) == (LEAST, 1.0)
    assert alone.stability_index is alone.estimated_accuracy is alone.tested_abstention is alone.chance_index is None
    assert meter.references[Watched("base", "", "fpb")] == (None, {})
    assert {each[3] for each in meter.counted[LEAST - 1 :]} == {None}


def test_new_weights_or_a_new_reference_begin_an_empty_window_and_a_copied_file_does_not(monitor, meter, due):
    answer(monitor, LEAST, adapter=Adapter())
    due.pop()()
    answer(monitor, 1, adapter=Adapter())  # read again, nothing has changed
    due.pop()()
    assert meter.windows[LETTERS].num_answers == LEAST + 1
    answer(monitor, 1, adapter=Adapter(hash="new"))
    assert meter.windows[LETTERS].num_answers == 0  # the old figures end at once
    due.pop()()
    assert (meter.windows[LETTERS].num_answers, meter.windows[LETTERS].stability_index) == (1, None)
    answer(monitor, 1, adapter=Adapter(hash="new", references=()))
    assert meter.references[LETTERS] == (None, {})


def test_reference_at_other_bits_or_of_a_part_is_used_with_a_word_in_the_log(meter, caplog):
    monitor = LabelMonitor(meter, 4, lambda *_rest: None)
    answer(monitor, 2, adapter=Adapter())
    words = "run `finlora evaluate` on the whole split with eval.bits=4."
    assert [record.getMessage() for record in caplog.records] == [
        "Labels of tone v1 letters are compared with the whole of its test split, answered at 8 bit; this server has 4: "
        + words
    ]
    assert meter.references[LETTERS][0] is REFERENCE


def test_update_of_a_window_that_was_replaced_shows_nothing(monitor, meter, due):
    answer(monitor, 1, adapter=Adapter())
    answer(monitor, 2, adapter=Adapter(hash="new"))
    for update in reversed(due):
        update()
    assert meter.windows[LETTERS].num_answers == 2


def test_rare_labels_are_counted_together(monitor, meter, due):
    choices = tuple(f"l{number}" for number in range(60))
    many = [3] * 60
    many[59] = 50
    reference = {**{name: getattr(REFERENCE, name) for name in REFERENCE.__dataclass_fields__}}
    reference |= {"choices": list(choices), "answers": many, "truths": many, "below": [0] * 101}
    adapter = Adapter(references=(Reference(**reference),))
    for label in ("l59", "l0", "l47", "l48", "l58"):
        answer(monitor, 30, label, 0.9, adapter, choices=choices)
    assert [meter.counted[index][1] for index in range(0, 150, 30)] == ["l59", "l0", "l47", OTHER, OTHER]
    _, shares = meter.references[LETTERS]
    assert len(shares) == MAX_LABELS
    assert list(shares)[:2] == ["l59", "l0"]
    assert math.fsum(shares.values()) == pytest.approx(1)
    assert shares[OTHER] == pytest.approx(33 / 227)
    due.pop()()
    own = [50, *[3] * 48, 33]
    found = [30, 30, *[0] * 46, 30, 60]
    assert meter.windows[LETTERS].stability_index == pytest.approx(stability_index(own, found))


def test_process_watches_a_bounded_number_and_says_once_what_it_leaves_out(monitor, meter, monkeypatch, caplog):
    monkeypatch.setattr(label_monitor, "MAX_WINDOWS", 2)
    for task in ("a", "b", "c", "d", "a"):
        answer(monitor, 1, task=task)
    assert [each[0].task for each in meter.counted] == ["a", "b", "a"]
    assert [record.getMessage() for record in caplog.records] == [
        "Labels of base c are not monitored: this process watches 2 adapters, versions and tasks already."
    ]
