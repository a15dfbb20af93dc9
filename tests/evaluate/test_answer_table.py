"""Tables of answers: what is kept of an evaluation, without texts, and bound to its Result by hash."""

from __future__ import annotations

import pytest
from carded import make_table

from finlora.data.example import Example
from finlora.errors import ResultError
from finlora.evaluate.answer_table import make_answer_table, read_answer_table, write_answer_table


def make_example(number: int, group: str, **changes) -> Example:
    plain = {"prompt": "Is it good?", "answer": "good", "label": "good", "choices": ("bad", "good"), "source": "f:1"}
    return Example(id=f"t-{number}", task="t", group=group, **(plain | changes))


def test_table_holds_labels_lengths_and_groups_but_no_text(tmp_path):
    examples = [
        make_example(0, "the secret sentence", time="2024-05-01"),
        make_example(1, "the secret sentence", prompt="Longer prompt?"),
        make_example(2, "another", answer="a secret tag", label="a secret tag", choices=()),
    ]
    table = make_answer_table(["good", "bad", "a secret tag"], examples, [True, False, True], {0: 0.9, 1: 0.6})
    assert (table.group, table.chars, table.time) == ([0, 0, 1], [11, 14, 11], ["2024-05-01", "", ""])
    assert (table.label, table.answer) == (["good", "good", None], ["good", "bad", None])
    assert table.probability == [0.9, 0.6, None]
    path = tmp_path / "new" / "answers.parquet"
    digest = write_answer_table(table, path)
    assert read_answer_table(path, digest) == table
    assert b"secret" not in path.read_bytes()
    assert [file.name for file in path.parent.iterdir()] == ["answers.parquet"]


def test_changed_or_missing_table_is_named(tmp_path):
    path = tmp_path / "answers.parquet"
    digest = write_answer_table(make_table([True, False]), path)
    write_answer_table(make_table([True, True]), path)
    with pytest.raises(ResultError, match=r"answers.parquet was changed after its evaluation: its SHA-256 is"):
        read_answer_table(path, digest)
    path.unlink()
    with pytest.raises(ResultError, match=r"cannot be read as a table of answers .*Run `finlora evaluate` again"):
        read_answer_table(path, digest)
