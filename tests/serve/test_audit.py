"""The audit log: a chain that holds, and breaks where a line is touched."""

from __future__ import annotations

import json
import stat

import pytest

from finlora.errors import ResultError
from finlora.serve.audit import AuditEntry, AuditLog, verify_audit

FIELDS = {
    "request_id": "req-1",
    "key_id": "desk",
    "path": "/v1/classify",
    "model": "tiny",
    "base_hash": "b",
    "adapter_hash": None,
    "prompt_hash": "p",
    "output_hash": "o",
    "outcome": "choice",
    "prompt_tokens": 3,
    "completion_tokens": 0,
    "seconds": 0.25,
}


@pytest.fixture
def log(tmp_path):
    log = AuditLog(tmp_path)
    for number in range(5):
        log.append(AuditEntry(**FIELDS | {"request_id": f"req-{number}"}))
    log.close()
    return log


def test_chain_holds_and_ends_at_the_head(log):
    assert verify_audit(log.path) == (5, log.head)
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    line = json.loads(log.path.read_text().splitlines()[2])
    assert line["request_id"] == "req-2"
    assert not {"prompt", "output"} & line.keys()


def test_texts_are_kept_where_they_are_wanted(tmp_path):
    log = AuditLog(tmp_path)
    log.append(AuditEntry(**FIELDS, prompt="Größe", output="yes"))
    log.close()
    assert json.loads(log.path.read_text())["prompt"] == "Größe"
    assert verify_audit(log.path)[0] == 1


def change(lines):
    return [lines[0], lines[1].replace('"desk"', '"boss"'), *lines[2:]]


def reseal(lines):
    """What someone who knows the form would do: change a line and compute its hash anew."""
    from finlora.serve.audit import _seal

    values = json.loads(lines[1]) | {"key_id": "boss"}
    previous, _ = values.pop("previous"), values.pop("hash")
    return [lines[0], _seal(values, previous)[0], *lines[2:]]


@pytest.mark.parametrize(
    ("alter", "words"),
    [
        (change, "line 2 was changed"),
        (reseal, "line 3 does not follow"),
        (lambda lines: lines[1:], "line 1 does not follow"),
        (lambda lines: [*lines[:2], *lines[3:]], "line 3 does not follow"),
        (lambda lines: [lines[1], lines[0], *lines[2:]], "line 1 does not follow"),
        (lambda lines: [*lines[:4], lines[4][:-9]], "line 5 is no entry"),
        (lambda lines: [*lines, "{}"], "line 6 is no entry"),
        (lambda lines: [*lines, "[1]"], "line 6 is no entry"),
    ],
)
def test_altered_line_is_named(log, alter, words):
    log.path.write_text("\n".join(alter(log.path.read_text().splitlines())) + "\n")
    with pytest.raises(ResultError, match=words):
        verify_audit(log.path)


def test_lines_cut_off_at_the_end_show_in_the_head(log):
    log.path.write_text("".join(line + "\n" for line in log.path.read_text().splitlines()[:3]))
    count, head = verify_audit(log.path)
    assert (count, head != log.head) == (3, True)
