"""Comparability with the paper: our measurement for each of its numbers, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from finlora.data.sets.catalog import is_papers_test
from finlora.report.paper import PaperValue
from finlora.results import Result

_Condition = tuple[Callable[[Result], bool], str]
"""A condition on a measurement, and the reason given where none meets it."""


def find_ours(value: PaperValue, results: Sequence[Result]) -> Result | None:
    """Return our newest measurement that is comparable with a number of the paper, or None.

    A Llama of the same size, variant and task is needed; inference memory also needs batch size 1, accuracies
    pretrained weights. A full measurement is preferred to a partial one, and of equal times the later line.
    """
    found = [result for result in results if all(meets(result) for meets, _ in _conditions(value))]
    return max(reversed(found), key=lambda result: (not result.is_partial, result.created), default=None)


def explain_missing(value: PaperValue, results: Sequence[Result]) -> str:
    """Return why `find_ours` finds nothing: the first condition that no measurement meets beside those before it."""
    for meets, reason in _conditions(value):
        results = [result for result in results if meets(result)]
        if not results:
            return reason
    raise ValueError("found a measurement, expected none")


def is_like(value: PaperValue, result: Result, *, on_any_test: bool = False) -> bool:
    """Return whether a measurement is of the same kind as a number of the paper, whatever its base.

    Args:
        on_any_test: an accuracy may be on another test split than the paper's.
    """
    _, *conditions = _conditions(value)
    return all(meets(result) for meets, _ in conditions if not (on_any_test and meets is _is_on_papers_test))


def is_llama(result: Result, size: str) -> bool:
    """Return whether the base is the paper's of a size, by its name."""
    base = result.base.lower()
    return "llama" in base and f"-{size.lower()}" in base.replace("_", "-")


def has_random_weights(result: Result) -> bool:
    """Return whether the weights are random: speed and memory are real, scores mean nothing."""
    model = result.config.get("model")
    return isinstance(model, dict) and model.get("weights") == "random"


def _conditions(value: PaperValue) -> Iterator[_Condition]:
    yield lambda result: is_llama(result, value.size), f"no Llama {value.size} in these results"
    if value.variant is not None:
        yield lambda result: result.variant == value.variant, f"no {value.variant} of it"
    if value.tasks:
        yield lambda result: result.task in value.tasks, "not on this task"
    if value.quantity == "adapter_mib":
        yield lambda result: result.adapter_mib is not None, "no adapter size"
        return
    kind = "training" if value.quantity in ("training_memory_gib", "gpu_hours") else "evaluation"
    yield lambda result: result.kind == kind, f"no {kind} of it"
    if value.quantity == "training_memory_gib":
        yield lambda result: result.peak_memory_gib is not None, "memory was not measured"
        return
    if value.quantity == "gpu_hours":
        yield lambda result: result.gpu_hours is not None, "not on a GPU"
        return
    if value.bits is not None:
        yield lambda result: result.bits == value.bits, f"not at {value.bits} bit"
    if value.quantity == "accuracy":
        yield lambda result: not has_random_weights(result), "its weights are random"
        yield lambda result: "accuracy" in result.metrics, "no accuracy"
        yield _is_on_papers_test, "not on the published test split"
    elif value.quantity == "seconds_per_example":
        yield lambda result: result.seconds_per_example is not None, "time was not measured"
    else:
        yield _has_one_example, "eval.batch_size is not 1"
        yield lambda result: result.gpu_hours is not None and result.peak_memory_gib is not None, "not on a GPU"


def _is_on_papers_test(result: Result) -> bool:
    return is_papers_test(result.task, result.data_hash, result.num_examples, result.is_partial)


def _has_one_example(result: Result) -> bool:
    section = result.config.get("eval")
    return isinstance(section, dict) and section.get("batch_size") == 1
