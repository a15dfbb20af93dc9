"""Check of rows against the published set: counts, labels and the hash of each split."""

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
        task: its name in the catalog.
        variant: that was asked for.
        read: what the task's reader returned. An empty train split is not compared.
        is_of_hub: whether the rows are the hub's.
        is_own: accept other counts or labels too.

    Raises:
        DatasetError: the numbers or labels are not those of the published set, and `is_own` does not say so.
    """
    if task not in PUBLISHED:
        return ()
    forms = [
        form for form in PUBLISHED[task] if form.variant in (None, variant) and form.is_of_hub in (None, is_of_hub)
    ]
    if not forms:
        return (f"What the hub's table of {task} holds is not known to FinLoRA: its rows are taken as they are.",)
    form = next((form for form in forms if _has_counts(form, read)), None)
    fault: str | None
    if form is None:
        fault = f"found {_count(read)} examples, the published set has {' or '.join(map(_count_published, forms))}"
    else:
        fault = _compare_labels(form, read)
    if fault and not is_own:
        raise DatasetError(
            f"{task}: {fault}. Fetch the published files again; look for a lost or doubled line, a header or another split. For "
            "a part of the set or rows of your own pass --own-data: scores on them cannot stand beside the paper's."
        )
    if fault or form is None:
        return (f"Not the published set: {fault}. Scores on it cannot stand beside the paper's.",)
    return (_compare_hashes(form, read),)


def _has_counts(form: Published, read: Splits) -> bool:
    return len(read.test) == form.test and len(read.train) in (form.train, 0)


def _count(read: Splits) -> str:
    return f"{len(read.train):,} train / {len(read.test):,} test" if read.train else f"{len(read.test):,} test"


def _count_published(form: Published) -> str:
    return f"{form.train:,} train / {form.test:,} test"


def _compare_labels(form: Published, read: Splits) -> str | None:
    """Return how the numbers of the labels differ from the published ones; None where they are the same or not known."""
    expected = form.labels if read.train else form.test_labels
    found = Counter(item.label for item in (*read.train, *read.test))
    if not expected or found == Counter(expected):
        return None
    numbers = f"found {_show(found)}, the published set has {_show(expected)}"
    if sorted(found.values()) == sorted(expected.values()):
        moved = [f"{label} {found[label]:,}" for label in expected if found[label] != expected[label]]
        return f"labels are exchanged with one another ({', '.join(moved)}): {numbers}"
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
            f"As many examples as the published set, but its {' and '.join(other)} split is another: other texts, or another "
            "order of the rows. Scores on another test split cannot stand beside the paper's."
        )
    known_too = f" (of the {' and '.join(unknown)} split by its number of examples alone)" if unknown else ""
    return f"The published set, by its numbers, labels and hashes{known_too}."
