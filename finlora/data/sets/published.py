"""Counts, labels and hashes of the published datasets, by which prepared rows are checked.

Measured from the published files by the readers of finlora/data. A hash is that of a prepared split, 16 of its 64 digits. The
counts without a hash are the paper's or the publisher's, of files that were not at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """One published form of a task's data, as its reader splits it."""

    train: int
    """Examples."""
    test: int
    train_hash: str | None = None
    """None: not known."""
    test_hash: str | None = None
    labels: Mapping[str, int] = field(default_factory=dict)
    """Examples a label in both splits together, which no other order of the rows changes. Empty: not known, or free text."""
    test_labels: Mapping[str, int] = field(default_factory=dict)
    variant: str | None = None
    """None: all variants of the task."""
    is_of_hub: bool | None = None
    """Whether the hub's table alone has this form, or the raw files alone. None: both."""


_SENTIMENTS = ("negative", "neutral", "positive")


def _three(negative: int, neutral: int, positive: int) -> dict[str, int]:
    return dict(zip(_SENTIMENTS, (negative, neutral, positive), strict=True))


def _types(person: int, organization: int, location: int) -> dict[str, int]:
    return {"person": person, "organization": organization, "location": location}


PUBLISHED: Mapping[str, tuple[Published, ...]] = {
    "fpb": (
        Published(
            train=3634,
            test=1212,
            train_hash="50338cce61fa4ab5",
            test_hash="2d733bb57907f5a9",
            labels=_three(604, 2879, 1363),
            test_labels=_three(145, 729, 338),
        ),
    ),
    "fiqa": (
        Published(
            train=961,
            test=150,
            train_hash="e740f6aa2edb4747",
            test_hash="dd983cf010c31400",
            labels=_three(345, 82, 684),
            test_labels=_three(50, 49, 51),
        ),
    ),
    "fiqa_paper": (
        Published(
            train=938,
            test=275,
            train_hash="a102ce72215afef5",
            test_hash="ff8e46c3f0eb63c3",
            labels=_three(379, 116, 718),
            test_labels=_three(88, 21, 166),
        ),
    ),
    "tfns": (
        Published(
            train=9543,
            test=2388,
            train_hash="aad95bb2c7f04f08",
            test_hash="5cd44140ac7626f2",
            labels=_three(1789, 7744, 2398),
            test_labels=_three(347, 1566, 475),
        ),
    ),
    "nwgi": (Published(train=16_184, test=4047, test_hash="6c7c875c8474ed38", test_labels=_three(1342, 491, 2214)),),
    "headline": (
        Published(train=82_161, test=20_547),
        Published(
            train=50_736,
            test=12_684,
            train_hash="e5a2726c85d4d311",
            test_hash="31afddc7e7930639",
            labels={"No": 42_080, "Yes": 21_340},
            test_labels={"No": 8437, "Yes": 4247},
            is_of_hub=False,
        ),
    ),
    "ner": (
        Published(
            train=13_549,
            test=3502,
            test_labels=_types(2295, 697, 510),
            variant="as_published",
            is_of_hub=True,
        ),
        Published(
            train=13_549,
            test=3502,
            train_hash="e7e6a0a639aad2c7",
            test_hash="c5baf9372dfa7679",
            labels=_types(9826, 4318, 2907),
            test_labels=_types(2295, 697, 510),
            variant="as_published",
            is_of_hub=False,
        ),
        Published(
            train=13_549,
            test=3502,
            train_hash="33dc9aedaaafbc36",
            test_hash="50c84d1c1e438a4b",
            labels=_types(9911, 3944, 3196),
            test_labels=_types(2108, 816, 578),
            variant="corrected",
            is_of_hub=False,
        ),
    ),
    "xbrl_tags": (
        Published(train=89, test=115, train_hash="0b5df95f7b6c9e81", test_hash="275612871ded4175", is_of_hub=False),
    ),
    "xbrl_values": (
        Published(train=95, test=102, train_hash="bec65f853fc5846d", test_hash="f7e84f7e6be2d75a", is_of_hub=False),
    ),
}
"""Task -> its published forms. A generated task has none. What the hub's XBRL table holds is not known."""


def is_papers_test(task: str, data_hash: str | None, num_examples: int, is_partial: bool) -> bool:
    """Return whether a score is on the test split that the paper's score of the task is on, or nearest to.

    Args:
        data_hash: of the prepared test split.
        num_examples: examples scored.
        is_partial: whether they are not all of the split.
    """
    forms = [form for form in PUBLISHED.get(task, ()) if form.variant != "corrected"]
    if not forms:
        return True
    known = {form.test_hash for form in forms if form.test_hash}
    others = {form.test_hash for form in PUBLISHED[task] if form.variant == "corrected"}
    counts = {form.test for form in forms if form.test_hash is None}
    start = (data_hash or "")[:16]
    return start in known or (start not in others and not is_partial and num_examples in counts)
