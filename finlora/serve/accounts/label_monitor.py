"""Monitor of the labels that a process answers: counters by label, and a window of the last answers beside the test split.

One window for each adapter, version and task. Texts and questions are not kept: a window holds the number of the label, two
probabilities and whether the answer abstained.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from finlora.evaluate.calibration import calibrate_top
from finlora.evaluate.reference import Reference, find_reference
from finlora.evaluate.stability import chance_index, stability_index
from finlora.serve.adapter_versions import ServedAdapter

WINDOW, LEAST = 1000, 100
"""Answers of a window, and the fewest from which its figures are computed."""
MAX_LABELS = 50
"""Labels of a task with a figure of their own; the others, rarer in the test split, are counted together as OTHER."""
MAX_WINDOWS = 200
"""Windows of a process. Further adapters, versions and tasks are not monitored."""
OTHER = "(other)"
SHOW_AFTER_S = 1.0
"""Seconds from an answer to the update of the gauges: at most one a second."""
_logger = logging.getLogger(__name__)

Later = Callable[[float, Callable[[], None]], object]
"""Calls a function after some seconds."""


def call_later(seconds: float, function: Callable[[], None]) -> object:
    """Call a function from the running event loop."""
    return asyncio.get_running_loop().call_later(seconds, function)


class Watched(NamedTuple):
    """Whose answers are counted; the labels of each metric."""

    adapter: str
    """`base`: the base alone."""
    version: str
    """Empty: an adapter without versions."""
    task: str


@dataclass(frozen=True, kw_only=True, slots=True)
class WindowFigures:
    """Figures of a window for the gauges. None: fewer than LEAST answers, or no reference."""

    num_answers: int
    abstention: float | None = None
    """Share of the answers below their request's threshold."""
    tested_abstention: float | None = None
    """Share that the same thresholds give on the test split."""
    estimated_accuracy: float | None = None
    stability_index: float | None = None
    chance_index: float | None = None


class LabelMeter(Protocol):
    """Receiver of the figures."""

    def count_label(
        self, watched: Watched, label: str, probability: float, calibrated: float | None, *, is_abstained: bool
    ) -> None: ...

    def show_reference(self, watched: Watched, reference: Reference | None, shares: Mapping[str, float]) -> None: ...

    def show_window(self, watched: Watched, figures: WindowFigures) -> None: ...


class _Answer(NamedTuple):
    label: int
    """Index of its name."""
    calibrated: float
    is_abstained: bool
    tested_abstention: float


class _Window:
    """Last answers of one adapter, version and task.

    Args:
        adapter: None: the base alone.
        choices: the task's labels.
    """

    def __init__(self, adapter: ServedAdapter | None, choices: Sequence[str], reference: Reference | None) -> None:
        self.adapter, self.choices, self.reference = adapter, tuple(choices), reference
        tested = dict(zip(reference.choices, reference.answers, strict=True)) if reference else {}
        ranked = sorted(choices, key=lambda choice: -tested.get(choice, 0))  # stable: a tie keeps the task's order
        own = ranked if len(ranked) <= MAX_LABELS else ranked[: MAX_LABELS - 1]
        self.names = own if own is ranked else [*own, OTHER]
        self.index = {choice: min(number, len(self.names) - 1) for number, choice in enumerate(ranked)}
        self.tested = [0] * len(self.names)
        for choice, count in tested.items():
            self.tested[self.index[choice]] += count
        self.answers: deque[_Answer] = deque(maxlen=WINDOW)
        self.is_due = False
        """Whether an update of its gauges is scheduled."""

    def is_of(self, adapter: ServedAdapter | None, choices: Sequence[str], reference: Reference | None) -> bool:
        """Return whether an adapter that was read again is the same one, with the same reference."""
        old, new = (each.hash if each else None for each in (self.adapter, adapter))
        return (old, self.choices, self.reference) == (new, tuple(choices), reference)

    def tested_shares(self) -> dict[str, float]:
        """Return label -> its share of the test answers; none without a reference."""
        total = sum(self.tested)
        return {name: count / total for name, count in zip(self.names, self.tested, strict=True)} if total else {}

    def measure(self) -> WindowFigures:
        answers, reference = self.answers, self.reference
        num = len(answers)
        if num < LEAST:
            return WindowFigures(num_answers=num)
        abstention = sum(answer.is_abstained for answer in answers) / num
        if reference is None:
            return WindowFigures(num_answers=num, abstention=abstention)
        counts = Counter(answer.label for answer in answers)
        found = [counts[label] for label in range(len(self.names))]
        return WindowFigures(
            num_answers=num,
            abstention=abstention,
            tested_abstention=math.fsum(answer.tested_abstention for answer in answers) / num,
            estimated_accuracy=math.fsum(answer.calibrated for answer in answers) / num,
            stability_index=stability_index(self.tested, found),
            chance_index=chance_index(reference.num_answers, num, len(self.names)),
        )


class LabelMonitor:
    """Monitor of one process.

    Args:
        bits: bits of the served base.
        later: calls a function after some seconds.
    """

    def __init__(self, meter: LabelMeter, bits: int, later: Later = call_later) -> None:
        self._meter, self._bits, self._later = meter, bits, later
        self._windows: dict[Watched, _Window] = {}
        self._is_full_logged = False

    def count(
        self,
        adapter: ServedAdapter | None,
        task: str,
        choices: Sequence[str],
        probabilities: Mapping[str, float],
        threshold: float,
    ) -> None:
        """Count one answer.

        Args:
            adapter: None: the base alone.
            choices: the task's labels.
            probabilities: label -> probability.
            threshold: of the request; a label below it is an abstention.
        """
        watched = Watched(adapter.name, adapter.version or "", task) if adapter else Watched("base", "", task)
        window = self._find_window(watched, adapter, choices)
        if window is None:
            return
        label = max(probabilities, key=probabilities.__getitem__)
        top, reference = probabilities[label], window.reference
        calibrated = calibrate_top(list(probabilities.values()), reference.temperature) if reference else None
        is_abstained = top < threshold
        index = window.index[label]
        window.answers.append(
            _Answer(
                label=index,
                calibrated=calibrated or 0.0,
                is_abstained=is_abstained,
                tested_abstention=reference.abstention_at(threshold) if reference else 0.0,
            )
        )
        self._meter.count_label(watched, window.names[index], top, calibrated, is_abstained=is_abstained)
        if not window.is_due:
            window.is_due = True
            self._later(SHOW_AFTER_S, lambda: self._show(watched, window))

    def _show(self, watched: Watched, window: _Window) -> None:
        window.is_due = False
        if self._windows[watched] is window:
            self._meter.show_window(watched, window.measure())

    def _find_window(self, watched: Watched, adapter: ServedAdapter | None, choices: Sequence[str]) -> _Window | None:
        """Return the window of an answer, an empty one where weights or reference are new; None: there are too many windows."""
        window = self._windows.get(watched)
        if window is not None and window.adapter is adapter:  # the shelf returns one object while no file changes
            return window
        references = adapter.references if adapter else ()
        reference = find_reference(references, watched.task, choices, self._bits)
        if window is not None and window.is_of(adapter, choices, reference):
            window.adapter = adapter
            return window
        if window is None and len(self._windows) >= MAX_WINDOWS:
            if not self._is_full_logged:
                self._is_full_logged = True
                _logger.warning(
                    "Labels of %s are not monitored: this process watches %d adapters, versions and tasks already.",
                    *(" ".join(filter(None, watched)), MAX_WINDOWS),
                )
            return None
        new = self._windows[watched] = _Window(adapter, choices, reference)
        self._meter.show_reference(watched, reference, new.tested_shares())
        if reference is not None and (reference.bits != self._bits or reference.is_partial):
            _logger.warning(
                "Labels of %s are compared with %s of its test split, answered at %d bit; this server has %d: run "
                "`finlora evaluate` on the whole split with eval.bits=%d.",
                *(" ".join(filter(None, watched)), "a part" if reference.is_partial else "the whole"),
                *(reference.bits, self._bits, self._bits),
            )
        if window is not None:  # the figures of the old one are over
            self._meter.show_window(watched, new.measure())
        return new
