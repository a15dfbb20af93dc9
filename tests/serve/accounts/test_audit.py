"""Audit log: its hash chain holds, and breaks at a changed line."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys

import pytest

from finlora.cli.main import main
from finlora.errors import ResultError
from finlora.serve.accounts.audit import AuditEntry, AuditLog, AuditReport, list_logs, verify_audit

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


def test_chain_is_intact_and_ends_at_the_head(log):
    assert verify_audit(log.path) == AuditReport(count=5, head=log.head, has_torn_line=False, found=frozenset())
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    line = json.loads(log.path.read_text().splitlines()[2])
    assert line["request_id"] == "req-2"
    assert not {"prompt", "output"} & line.keys()


def test_texts_are_written_if_configured(tmp_path):
    log = AuditLog(tmp_path)
    log.append(AuditEntry(**FIELDS, prompt="Größe", output="yes"))
    log.close()
    assert json.loads(log.path.read_text())["prompt"] == "Größe"
    assert verify_audit(log.path).count == 1


def change(lines):
    return [lines[0], lines[1].replace('"desk"', '"boss"'), *lines[2:]]


def reseal(lines):
    """Change a line and recompute its hash, like an attacker who knows the format."""
    from finlora.serve.accounts.audit import _seal

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
        (lambda lines: [*lines[:4], lines[4][:-9]], "line 5 is not an entry"),
        (lambda lines: [*lines, "{}"], "line 6 is not an entry"),
        (lambda lines: [*lines, "[1]"], "line 6 is not an entry"),
        (lambda lines: [*lines, "[" * 100_000], "line 6 is not an entry"),
        (lambda lines: [*lines, "é"], "line 6 is not an entry"),
        (lambda lines: [*lines[:4], " " + lines[4]], "line 5 was changed"),
        (lambda lines: [*lines[:4], lines[4].replace("{", '{"key_id": "boss", ', 1)], "line 5 was changed"),
        (lambda lines: [*lines[:4], lines[4], lines[4]], "line 6 does not follow"),
    ],
)
def test_altered_line_is_named(log, alter, words):
    log.path.write_text("\n".join(alter(log.path.read_text().splitlines())) + "\n")
    with pytest.raises(ResultError, match=words):
        verify_audit(log.path)


def logged_heads(caplog):
    return [record.args[2] for record in caplog.records if "The audit log" in record.msg]


def test_heads_in_the_servers_log_reveal_truncation_and_rewriting(tmp_path, caplog):
    """The chain alone does not: anyone who can write the file can recompute it. The heads are in another log."""
    log = AuditLog(tmp_path, head_every_s=0.0)
    for _ in range(3):
        log.append(AuditEntry(**FIELDS))
    log.close()
    heads = logged_heads(caplog)
    assert len(heads) == 3
    assert verify_audit(log.path, heads).found == set(heads)
    log.path.write_text("".join(line + "\n" for line in log.path.read_text().splitlines()[:2]))
    report = verify_audit(log.path, heads)
    assert (report.count, report.found) == (2, set(heads[:2]))
    rewritten = AuditLog(tmp_path)
    for _ in range(3):
        rewritten.append(AuditEntry(**FIELDS | {"key_id": "boss"}))
    rewritten.close()
    assert verify_audit(rewritten.path, heads).found == frozenset()


def test_empty_and_foreign_files_are_reported(tmp_path, capsys):
    (tmp_path / "audit-a.jsonl").touch()
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(tmp_path)])
    assert ended.value.code == 0
    assert "audit-a.jsonl: empty. No question was logged yet, or all lines were cut off" in capsys.readouterr().out
    (tmp_path / "audit-a.jsonl").write_bytes(b"PK\x03\x04\xff\n")
    with pytest.raises(
        ResultError, match=r"line 1 is not an entry .*: expected a line of JSON as the server wrote it\. Compare"
    ):
        verify_audit(tmp_path / "audit-a.jsonl")


def test_audit_verb_finds_heads_or_fails(log, capsys, monkeypatch):
    for name in ("HF_HUB_DISABLE_TELEMETRY", "TOKENIZERS_PARALLELISM", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "0")  # main sets them if unset; monkeypatch restores them

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(["audit", str(log.path.parent), *arguments])
        output = capsys.readouterr()
        return stop.value.code, " ".join((output.out + output.err).split())

    assert run("--head", log.head)[0] == 0
    code, words = run("--head", log.head, "--head", "f" * 64)
    assert (code, "holds the head ffff" in words) == (7, True)
    log.path.write_bytes(log.path.read_bytes()[:-30])
    code, words = run()
    assert (code, "4 entries, intact" in words, "the line after it is incomplete" in words) == (0, True, True)
    assert run("--head", log.head)[0] == 7


def test_crash_at_any_byte_keeps_the_entries_before_it(log):
    whole = log.path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for size in [*range(0, len(whole), 37), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])]:
        log.path.write_bytes(whole[:size])
        report = verify_audit(log.path)
        assert (report.count, report.has_torn_line) == (sum(end <= size for end in ends), size not in [0, *ends])


def test_full_disk_refuses_the_entry_and_the_chain_continues(tmp_path, monkeypatch):
    log = AuditLog(tmp_path)
    log.append(AuditEntry(**FIELDS))
    write, left = os.write, [100]

    def fill(descriptor, raw):
        if not left:
            raise OSError(28, "No space left on device")
        return write(descriptor, raw[: left.pop()])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", fill)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                log.append(AuditEntry(**FIELDS | {"request_id": "lost"}))
    log.append(AuditEntry(**FIELDS))
    log.close()
    log.close()
    assert verify_audit(log.path) == AuditReport(count=2, head=log.head, has_torn_line=False, found=frozenset())
    assert "lost" not in log.path.read_text()


WRITER = """
import sys
from pathlib import Path
from finlora.serve.accounts.audit import AuditEntry, AuditLog
log = AuditLog(Path(sys.argv[1]))
number = 0
while True:
    log.append(AuditEntry(request_id=f"req-{number}", key_id="desk", path="/v1/classify", model="tiny", base_hash="b",
        adapter_hash=None, prompt_hash="p", output_hash="o", outcome="choice", prompt_tokens=3, completion_tokens=0,
        seconds=0.25, prompt="x" * 5000))
    number += 1
    print(number, flush=True)
"""


def test_killed_servers_lose_no_confirmed_entry(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    confirmed, counts = [], []
    try:
        for writer in writers:
            confirmed.append([int(writer.stdout.readline()) for _ in range(50)])
        for writer, first in zip(writers, confirmed, strict=True):
            writer.kill()
            counts.append([*first, *(int(line) for line in writer.stdout if line.endswith("\n"))][-1])
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
            writer.stdout.close()
    logs = list_logs(tmp_path)
    assert len(logs) == 2
    found = sorted(verify_audit(log).count for log in logs)
    # Every confirmed entry is in the file, and at most one that was written but not yet confirmed.
    assert all(0 <= written - count <= 1 for written, count in zip(found, sorted(counts), strict=True))
