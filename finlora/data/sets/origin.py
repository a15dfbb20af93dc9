"""Comparison of rows with the published set: counts, labels and the hash of each split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from finlora.data.example import Example, Splits
from finlora.data.sets.catalog import PUBLISHED
from finlora.data.sets.prepared import examples_hash
from finlora.data.task import Published
from finlora.errors import DatasetError


def compare_published(task: str, variant: str, read: Splits, *, is_of_hub: bool, is_own: bool) -> tuple[str, ...]:
    """Return a sentence on how the rows relate to the published set; none for a generated task.

    Args:
        task: name in the catalog.
        variant: as requested.
        read: what the task's reader returned. An empty train split is not compared.
        is_of_hub: whether the rows are the hub's.
        is_own: accept other counts or labels.

    Raises:
        DatasetError: counts or labels differ from the published set's, without `is_own`.
    """
    if task not in PUBLISHED:
        return ()
    forms = [
        form for form in PUBLISHED[task] if form.variant in (None, variant) and form.is_of_hub in (None, is_of_hub)
    ]
    if not forms:
        return (f"FinLoRA does not know the content of the hub's table of {task}: its rows are taken as they are.",)
    form = next((form for form in forms if _has_counts(form, read)), None)
    fault: str | None
    if form is None:
        fault = f"found {_count(read)} examples, the published set has {' or '.join(map(_count_published, forms))}"
    else:
        fault = _compare_labels(form, read)
    if fault and not is_own:
        raise DatasetError(
            f"{task}: {fault}. Fetch the published files again; look for a lost or repeated line, a header or another split. For "
            "part of the set or your own rows pass --own-data: scores on them cannot be compared with the paper's."
        )
    if fault or form is None:
        return (f"Not the published set: {fault}. Scores on it cannot be compared with the paper's.",)
    return (_compare_hashes(form, read),)


def _has_counts(form: Published, read: Splits) -> bool:
    return len(read.test) == form.test and len(read.train) in (form.train, 0)


def _count(read: Splits) -> str:
    return f"{len(read.train):,} train / {len(read.test):,} test" if read.train else f"{len(read.test):,} test"


def _count_published(form: Published) -> str:
    return f"{form.train:,} train / {form.test:,} test"


def _compare_labels(form: Published, read: Splits) -> str | None:
    """Return how the label counts differ from the published ones; None if they are equal or unknown."""
    expected = form.labels if read.train else form.test_labels
    found = Counter(item.label for item in (*read.train, *read.test))
    if not expected or found == Counter(expected):
        return None
    numbers = f"found {_show(found)}, the published set has {_show(expected)}"
    if sorted(found.values()) == sorted(expected.values()):
        moved = [f"{label} {found[label]:,}" for label in expected if found[label] != expected[label]]
        return f"labels are swapped ({', '.join(moved)}): {numbers}"
    return numbers


def _show(labels: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {labels[label]:,}" for label in sorted(labels))


def _compare_hashes(form: Published, read: Splits) -> str:
    parts: list[tuple[str, tuple[Example, ...], str | None]] = [
        ("train", read.train, form.train_hash),
        ("test", read.test, form.test_hash),
    ]
    parts = [part for part in parts if part[1]]
    unknown = [name for name, _, known in parts if known is None]
    other = [name for name, examples, known in parts if known and not examples_hash(examples).startswith(known)]
    if other:
        return (
            f"As many examples as the published set, but its {' and '.join(other)} split differs: other texts, or another "
            "order of the rows. Scores on another test split cannot be compared with the paper's."
        )
    known_too = f" (of the {' and '.join(unknown)} split by its number of examples alone)" if unknown else ""
    return f"The published set, by its numbers, labels and hashes{known_too}."
