"""Reference of an adapter's answers: label shares, accuracy and calibration on its test split, in a file beside its weights.

`finlora evaluate` writes reference.json into the adapter's folder, and a server compares the labels that it answers with it. It
holds counts, no text. The contract does not list it: writing it changes no hash of the adapter and no approval.
"""

from __future__ import annotations

import dataclasses
import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finlora.configfile import settings_from_tree
from finlora.data.sets.catalog import TASKS
from finlora.durable import hash_file, seal, write_whole
from finlora.errors import AdapterError, ConfigError, counted
from finlora.evaluate.calibration import fit_temperature, spacing_of
from finlora.evaluate.sealed_rows import read_sealed_rows
from finlora.model.adapter_files import ADAPTER_WEIGHTS
from finlora.results import Result, read_results

REFERENCE_FILE = "reference.json"
GRID = 100
"""Equal parts of the range of thresholds, 0 to 1, at whose ends `below` counts."""
_VERSION = 1
_MAX_BYTES = 2**22
_BLOCK = 4096
"""Answers that are counted at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFacts:
    """How a model labels a test split. Lists are in the order of `choices`."""

    choices: list[str]
    answers: list[int]
    """Test examples for which the choice is the most probable one."""
    truths: list[int]
    """Test examples whose true answer it is."""
    accuracy: float
    """Share of the examples whose most probable choice is the true answer."""
    temperature: float
    """Of the calibration (calibration.py)."""
    num_fitted: int
    """Test answers from which the temperature was fitted."""
    estimated_accuracy: float
    """Mean calibrated probability of the most probable choice."""
    below: list[int]
    """Answers whose most probable choice has a probability below 0.00, 0.01, ... 1.00."""

    def __post_init__(self) -> None:
        sizes = {len(self.choices), len(self.answers), len(self.truths)}
        counts = [*self.answers, *self.truths, *self.below]
        if len(sizes) != 1 or len(self.below) != GRID + 1 or min(counts) < 0 or self.num_answers < 1:
            raise ConfigError("its lists of counts do not fit together")
        if self.below != sorted(self.below) or self.below[-1] > self.num_answers:
            raise ConfigError("its counts below a threshold do not grow")
        if not (self.temperature > 0 and 0 <= self.accuracy <= 1 and 0 <= self.estimated_accuracy <= 1):
            raise ConfigError("its temperature or accuracy is out of range")

    @property
    def num_answers(self) -> int:
        return sum(self.answers)

    def abstention_at(self, threshold: float) -> float:
        """Return the share of the test answers below a threshold; between two counts by linear interpolation."""
        position = threshold * GRID
        low = min(math.floor(position + 1e-9), GRID)
        step = self.below[min(low + 1, GRID)] - self.below[low]
        return (self.below[low] + max(0.0, position - low) * step) / self.num_answers


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference(LabelFacts):
    """Facts of one task, from the evaluation that counts."""

    task: str
    bits: int
    """Bits of the base in the evaluation."""
    is_partial: bool
    """Whether only a part of the test split was answered."""
    data_hash: str | None
    """Hash of the prepared test split."""
    created: str

    @property
    def asked_as(self) -> str:
        """Task by whose name a server is asked: a generated set has the question of a published one."""
        known = TASKS.get(self.task)
        return known.asked_as if known and known.asked_as else self.task


def measure_labels(
    choices: Sequence[str], probabilities: Sequence[Sequence[float]], truths: Sequence[str]
) -> LabelFacts:
    """Return the facts of a test split's answers.

    Args:
        choices: allowed answers of each example.
        probabilities: of each answer, in the order of `choices`; at least one answer.
        truths: true answers.
    """
    import numpy as np

    order = {choice: index for index, choice in enumerate(choices)}
    true = [order[truth] for truth in truths]
    temperature = fit_temperature(probabilities, true)
    chosen: list[int] = []
    tops: list[float] = []
    calibrated: list[float] = []
    for start in range(0, len(true), _BLOCK):
        block = np.asarray(probabilities[start : start + _BLOCK], dtype=np.float64)
        highest = block.max(axis=1)
        chosen += block.argmax(axis=1).tolist()
        tops += highest.tolist()
        calibrated += (1 / ((block / highest[:, None]) ** (1 / temperature)).sum(axis=1)).tolist()
    tops.sort()
    answers, labels = Counter(chosen), Counter(true)
    return LabelFacts(
        choices=list(choices),
        answers=[answers[index] for index in range(len(choices))],
        truths=[labels[index] for index in range(len(choices))],
        accuracy=sum(map(int.__eq__, chosen, true)) / len(true),
        temperature=temperature,
        num_fitted=math.ceil(len(true) / spacing_of(len(true), len(choices))),
        estimated_accuracy=math.fsum(calibrated) / len(true),
        below=[bisect_left(tops, edge / GRID) for edge in range(GRID + 1)],
    )


def refresh_reference(adapter: Path, results: Path) -> str:
    """Write the reference of an adapter from a results file; returns what to tell the user, empty where there is none.

    Tasks and bits that were evaluated into other results files keep their reference.
    A folder that cannot be written keeps its reference: the facts are in the results file.
    """
    path = adapter / REFERENCE_FILE
    try:
        weights_hash = hash_file(adapter / ADAPTER_WEIGHTS)
        references = choose_references(read_results(results), weights_hash, _read_old(adapter, weights_hash))
        if not references:
            return ""
        tasks = [dataclasses.asdict(each) for each in references]
        values = seal({"format": _VERSION, "adapter_hash": weights_hash, "tasks": tasks})
        write_whole(path, json.dumps(values, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"{path} is not written ({error.strerror}): a server compares with its old state, if there is one."
    shown = "; ".join(
        f"{each.task} at {each.bits} bit, {counted(each.num_answers, 'answer')}, temperature {each.temperature:.2f}"
        for each in references
    )
    return f"Reference of monitoring written to {path}: {shown}"


def choose_references(results: Sequence[Result], weights_hash: str, old: Sequence[Reference] = ()) -> list[Reference]:
    """Return the reference of each task and number of bits: the newest evaluation, of the whole split where there is one.

    Args:
        results: oldest first.
        weights_hash: SHA-256 of the adapter's weights; other evaluations do not count.
        old: those of earlier results.
    """
    found = {(each.task, each.bits): each for each in old}
    for result in results:
        if result.kind != "evaluation" or result.adapter_hash != weights_hash or not result.labels:
            continue
        facts = {name: getattr(result, name) for name in ("task", "bits", "is_partial", "data_hash", "created")}
        try:
            new = settings_from_tree(Reference, {**result.labels, **facts})
        except ConfigError:  # of another version of FinLoRA
            continue
        other = found.get((new.task, new.bits))
        if other is None or other.is_partial or not new.is_partial:
            found[new.task, new.bits] = new
    return [found[key] for key in sorted(found)]


def _read_old(adapter: Path, weights_hash: str) -> tuple[Reference, ...]:
    """Return the references that stand; none of a damaged file or of other weights, which is written anew."""
    try:
        return read_references(adapter, weights_hash)
    except AdapterError:
        return ()


def read_references(folder: Path, weights_hash: str) -> tuple[Reference, ...]:
    """Read the references of an adapter; without the file there are none.

    Args:
        weights_hash: SHA-256 of the adapter's weights.

    Raises:
        AdapterError: the file is damaged, or belongs to other weights.
    """
    path = folder / REFERENCE_FILE
    if not path.exists():
        return ()
    again = "Run `finlora evaluate` with this adapter to write it again."
    references, found = read_sealed_rows(
        *(path, Reference),
        key="tasks",
        version=_VERSION,
        max_bytes=_MAX_BYTES,
        what="a reference as `finlora evaluate` writes it",
        again=again,
    )
    if found != weights_hash:
        raise AdapterError(f"{path} belongs to other weights ({found[:12]}, these are {weights_hash[:12]}). {again}")
    return references


def find_reference(references: Sequence[Reference], task: str, choices: Sequence[str], bits: int) -> Reference | None:
    """Return the reference of a task as a server is asked it, at the same bits if there is one, else the newest. None: none fits.

    Args:
        choices: allowed answers, which must be those of the reference.
    """
    fitting = [each for each in references if each.asked_as == task and set(each.choices) == set(choices)]
    return max(fitting, key=lambda each: (each.task == task, each.bits == bits, each.created), default=None)
