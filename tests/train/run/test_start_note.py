"""Start of a run: what its worker notes, and what its driver makes of it."""

from __future__ import annotations

import pytest

from finlora.machine.start_clock import StartClock
from finlora.train.run import start_note
from finlora.train.run.run_folder import RunFolder
from finlora.train.run.start_note import StartWatch, clear_note, read_note, write_note


@pytest.fixture
def now(monkeypatch):
    """Seconds of the clock of this machine, to be set."""
    seconds = [100.0]
    monkeypatch.setattr(start_note, "read_boot_clock", lambda: seconds[0])
    return seconds


def run_worker(folder, now):
    """Write the notes of a worker whose start takes 7 s."""
    clock = StartClock("data", now=lambda: now[0], on_phase=lambda name: write_note(folder, clock, name))
    write_note(folder, clock, "data")
    now[0] += 1.0
    clock.enter("base")
    now[0] += 4.0
    clock.enter("first step")
    now[0] += 2.0
    clock.end()
    write_note(folder, clock, None)


def test_worker_notes_each_phase(tmp_path, now):
    folder = RunFolder(tmp_path)
    assert read_note(folder) is None
    clock = StartClock("data", now=lambda: now[0], on_phase=lambda name: write_note(folder, clock, name))
    write_note(folder, clock, "data")
    assert read_note(folder).phase == "data"
    now[0] += 1.5
    clock.enter("base")
    note = read_note(folder)
    assert (note.phase, dict(note.seconds), note.ended) == ("base", {"data": 1.5}, None)
    clear_note(folder)
    assert read_note(folder) is None


@pytest.mark.parametrize("damage", ["", "{", '{"phase": null}', '{"phase": null, "seconds": {}, "sha256": "0000"}'])
def test_note_that_is_not_whole_says_nothing_of_the_end(tmp_path, now, damage):
    folder, said = RunFolder(tmp_path), []
    folder.start.write_text(damage)
    watch = StartWatch(folder, StartClock("imports", now=lambda: now[0]), said.append)
    if damage != '{"phase": null}':  # no seal, as of an older version: it is read as it is
        watch.look(0.0)
        assert (said, watch.seconds) == ([], {})


def test_driver_announces_its_phases_and_the_workers_once(tmp_path, now):
    folder, said = RunFolder(tmp_path), []
    clock = StartClock("imports", now=lambda: now[0])
    now[0] += 3.0
    watch = StartWatch(folder, clock, said.append)
    watch.look(0.0)
    now[0] += 5.0
    run_worker(folder, now)
    now[0] += 0.8  # until the driver looks
    watch.look(waited=2.0)
    watch.look(waited=2.0)
    assert watch.seconds == {"imports": 3.0, "workers": 3.0, "data": 1.0, "base": 4.0, "first step": 2.0}
    assert said == ["Started in 13.0 s: imports 3.0, workers 3.0, data 1.0, base 4.0, first step 2.0"]


def test_clock_of_another_machine_is_not_compared(tmp_path, now, monkeypatch):
    """Its clock counts from another moment: the driver's own counts, to when it sees the note."""
    folder, said = RunFolder(tmp_path), []
    clock = StartClock("imports", now=lambda: now[0])
    other = [9000.0]
    monkeypatch.setattr(start_note, "_find_boot", lambda: "another")
    run_worker(folder, other)
    monkeypatch.setattr(start_note, "_find_boot", lambda: "this")
    watch = StartWatch(folder, clock, said.append)
    now[0] += 10.0
    watch.look(0.0)
    assert watch.seconds == {"imports": 0.0, "workers": 3.0, "data": 1.0, "base": 4.0, "first step": 2.0}
