"""Split of a task's rows into train and test: by share, group, time, column or files, after duplicates are grouped.

`by share` with `duplicates: apart` equals `train_test_split` of Hugging Face datasets, by which published benchmarks are split:
the test is the first rows of numpy's permutation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from finlora.data.taskfile.duplicates import Groups, group_duplicates
from finlora.data.taskfile.items import Item
from finlora.data.taskfile.record import TaskFile
from finlora.errors import DatasetError, counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Row indices of both splits in their order, and the group of each row."""

    train: tuple[int, ...]
    test: tuple[int, ...]
    groups: tuple[int, ...]
    """For each row, the first row of its group of equal or nearly equal texts, which are not independent measurements."""
    notes: tuple[str, ...]


def split_items(task: TaskFile, items: Sequence[Item]) -> Parts:
    """Split rows by the task's rule.

    Raises:
        DatasetError: train or test is empty.
    """
    duplicates = group_duplicates([item.text for item in items])
    together, by = task.split.duplicates == "together", task.split_by
    groups = duplicates.copy() if together else Groups(len(items))
    notes = [_describe_duplicates(items, duplicates, together and by not in ("column", "files"))]
    notes += _list_two_labels(items)
    if by in ("column", "files"):
        train = tuple(row for row, item in enumerate(items) if item.side == "train")
        test = tuple(row for row, item in enumerate(items) if item.side == "test")
    elif by == "time":
        train, test = _split_by_time(task, items, groups, notes)
    else:
        if by == "group":
            groups.join_equal(item.group for item in items)
        train, test = _split_by_share(task, groups)
    for name, rows, want in (("train", train, "train"), ("test", test, "test")):
        if not rows:
            raise DatasetError(f"{task.name}: {_explain_empty(task, items, name, want)}")
    notes += _list_leaks(task, items, train, test, duplicates)
    if not together:
        duplicates = Groups(len(items))
        duplicates.join_equal(item.text for item in items)
    return Parts(train=train, test=test, groups=tuple(duplicates.roots()), notes=tuple(notes))


def _split_by_share(task: TaskFile, groups: Groups) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Go through a permutation of the rows and put each one's whole group into the test, until the test has its share."""
    import numpy as np

    roots = groups.roots()
    order = [int(row) for row in np.random.default_rng(task.split.seed).permutation(len(roots))]
    wanted = math.ceil(task.split.test_share * len(roots))
    sizes = Counter(roots)
    chosen: set[int] = set()
    num_test = 0
    for row in order:
        size = sizes[roots[row]]
        # A group is taken only if the test comes nearer to its share: a huge one must not become the test.
        if roots[row] not in chosen and num_test + size - wanted <= wanted - num_test and num_test < wanted:
            chosen.add(roots[row])
            num_test += size
    if not chosen and len(sizes) > 1:
        chosen.add(min(sizes, key=lambda root: (sizes[root], root)))
    return (
        tuple(row for row in order if roots[row] not in chosen),
        tuple(row for row in order if roots[row] in chosen),
    )


def _split_by_time(
    task: TaskFile, items: Sequence[Item], groups: Groups, notes: list[str]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Put each group into the split of its last date. In the test, rows before its first day are left out: no test row is older
    than a training row."""
    if task.split.keep_together == "group":
        groups.join_equal(item.group for item in items)
    start = datetime.fromisoformat(task.split.test_from or "")
    roots = groups.roots()
    last: dict[int, datetime] = {}
    for root, item in zip(roots, items, strict=True):
        last[root] = max(last.get(root, datetime.min), _time_of(item))
    gap = start - timedelta(days=task.split.gap_days)
    train = tuple(row for row, root in enumerate(roots) if last[root] < gap)
    test = tuple(row for row, root in enumerate(roots) if last[root] >= start and _time_of(items[row]) >= start)
    num_gap = sum(gap <= last[root] < start for root in roots)
    num_old = sum(last[root] >= start > _time_of(item) for root, item in zip(roots, items, strict=True))
    if num_gap:
        notes.append(
            f"Left out {counted(num_gap, 'row')} of the {task.split.gap_days} days before {task.split.test_from}."
        )
    if num_old:
        notes.append(
            f"Left out {counted(num_old, 'row')} from before {task.split.test_from}: their group, or a nearly equal text, is "
            "in the test."
        )
    return train, test


def hold_out_latest(
    times: Sequence[str], groups: Sequence[str], share: float, gap_days: int
) -> tuple[list[int], list[int]]:
    """Return the training rows that a search keeps and those that it holds out, by the rule of a split by time.

    The latest groups are held out, about `share` of all rows. Other groups are kept if they end `gap_days` before.

    Args:
        times: ISO 8601, one per row.
        groups: one per row.
    """
    last: dict[str, str] = {}
    sizes = Counter(groups)
    for time, group in zip(times, groups, strict=True):
        last[group] = max(last.get(group, ""), time)
    start, num_held = "", 0
    for group in sorted(last, key=lambda name: last[name], reverse=True):
        if num_held >= share * len(times) and last[group] < start:
            break
        start, num_held = last[group], num_held + sizes[group]
    end = (datetime.fromisoformat(start) - timedelta(days=gap_days)).isoformat()
    rows = list(enumerate(zip(times, groups, strict=True)))
    kept = [row for row, (_, group) in rows if last[group] < end]
    return kept, [row for row, (time, group) in rows if last[group] >= start and time >= start]


def _time_of(item: Item) -> datetime:
    assert item.time is not None  # a split by time requires columns.time
    return item.time


def _describe_duplicates(items: Sequence[Item], groups: Groups, is_kept: bool) -> str:
    num_equal = len(items) - len({(item.text, item.about) for item in items})
    many = [size for size in Counter(groups.roots()).values() if size > 1]
    if not many:
        return "Duplicates: no text is equal or nearly equal to another."
    kept = "each kept in one split" if is_kept else "not moved by this split"
    repeated = f"{counted(num_equal, 'row')} {'repeats' if num_equal == 1 else 'repeat'} a text"
    alike = f"{sum(many):,} rows are in {counted(len(many), 'group')} of equal or nearly equal texts"
    return f"Duplicates: {repeated}; {alike}, {kept}."


def _list_two_labels(items: Sequence[Item]) -> list[str]:
    found: dict[tuple[str, str], set[str]] = {}
    for item in items:
        if not item.turns:
            found.setdefault((item.text, item.about), set()).add(item.answer)
    num = sum(len(answers) > 1 for answers in found.values())
    return [f"{num:,} texts have more than one label or answer: no model can be right on all of them."] if num else []


def _list_leaks(
    task: TaskFile, items: Sequence[Item], train: Sequence[int], test: Sequence[int], duplicates: Groups
) -> list[str]:
    notes = []
    by_group = "split: {by: group}"
    advice = {"time": "split.keep_together: group", "share": by_group}.get(task.split_by, f"{by_group}, or other files")
    column = task.columns.group

    def count(key: Callable[[int], object]) -> int:
        seen = {key(row) for row in train}
        return sum(key(row) in seen for row in test)

    if column is not None and (shared := count(lambda row: items[row].group)):
        notes.append(
            f"Warning: {shared:,} of {len(test):,} test rows share `{column}` with train, so scores can be too good. Keep them "
            f"apart by {advice}."
        )
    if alike := count(duplicates.find):
        notes.append(
            f"Warning: {alike:,} of {len(test):,} test rows have a text in train that is equal or nearly equal, so scores can be "
            "too good."
        )
    return notes


def _explain_empty(task: TaskFile, items: Sequence[Item], name: str, want: str) -> str:
    if task.split_by == "time":
        times = [_time_of(item) for item in items]
        span = f"times go from {min(times):%Y-%m-%d} to {max(times):%Y-%m-%d}"
        if name == "test":
            return (
                f"no row is on or after test_from {task.split.test_from}: {span}. Choose split.test_from between them."
            )
        gap = datetime.fromisoformat(task.split.test_from or "") - timedelta(days=task.split.gap_days)
        if num_before := sum(time < gap for time in times):
            shared, ways = [], ["another split"]
            if task.split.keep_together == "group":
                shared.append(f"`{task.columns.group}`")
            if task.split.duplicates == "together":
                shared.append("a nearly equal text")
                ways.append("split.duplicates: apart")
            return (
                f"no row is left for train: of {counted(num_before, 'row')} from before test_from and its gap each shares "
                f"{' or '.join(shared)} with a later row, and the split keeps such rows together. Choose {', or '.join(ways)}."
            )
        return f"no row is before test_from and its gap: {span}. Choose split.test_from between them."
    if task.split_by == "column":
        return f"no row has {want} in column {task.split.column}: expected rows of train and of test."
    if task.split_by in ("share", "group"):
        what = f"`{task.columns.group}` or nearly equal texts" if task.split_by == "group" else "nearly equal texts"
        return (
            f"all {len(items):,} rows are in one group by {what}, which the split keeps together. Choose another split, or "
            "split.duplicates: apart."
        )
    return f"{len(items):,} rows leave no {name} row: expected at least one. Change split, or give more rows."
