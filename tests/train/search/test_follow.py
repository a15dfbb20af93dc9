"""Display of a running training: its plan once, then its last record."""

from __future__ import annotations

from finlora.configfile import load_config
from finlora.machine.start_clock import StartClock
from finlora.train.run.progress import StepMark, append_progress, clear_step, read_step
from finlora.train.run.run_folder import RunFolder
from finlora.train.run.start_note import write_note
from finlora.train.search.follow import Follower, SearchFollower
from finlora.train.search.search_folder import SearchFolder, TrialRecord, write_record
from finlora.train.search.space import SearchConfig, sample_trials
from finlora.train.steps.loop import Progress


def record(step):
    return Progress(
        step=step,
        total_steps=10,
        epoch=1.0,
        loss=0.5,
        learning_rate=1e-4,
        tokens_per_second=1234.0,
        examples_per_second=2.0,
        memory_gib=1.5,
        seconds_left=61.0,
    )


def test_plan_comes_once_and_records_as_they_are_written(tmp_path):
    folder, shown, said = RunFolder(tmp_path), [], []
    follow = Follower(
        folder, "run", lambda *shows: shown.append(shows), said.append, lambda seconds: f"{seconds:.0f} s"
    )
    follow()
    assert (shown, said) == ([], [])
    folder.plan.write_text("Training packed: a pack\n")
    for step in (1, 2):
        append_progress(folder, record(step))
        follow()
    assert said == ["Training packed: a pack"]
    assert [row[:3] for row in shown] == [("run", 1, 10), ("run", 2, 10)]
    assert shown[1][3] == "loss 0.5000  1,234 tokens/s  1.5 GiB  61 s left"


def test_step_mark_is_written_by_time_and_shown_between_records(tmp_path):
    folder, shown, now = RunFolder(tmp_path), [], [100.0]
    mark = StepMark(folder, 10, lambda: now[0])
    follow = Follower(folder, "run", lambda *shows: shown.append(shows), lambda _line: None, str)
    written = []
    for step in range(1, 11):
        mark.tick(step)
        follow()
        written.append(folder.step.read_text())
        if step == 4:
            append_progress(folder, record(4))
        now[0] += 2.0
    assert written == [f"{step} 10" for step in (1, 1, 1, 4, 4, 4, 7, 7, 7, 10)]
    assert [row[1:3] for row in shown] == [(step, 10) for step in (1, 1, 1, 4, 4, 4, 7, 7, 7, 10)]
    assert shown[3][3] == ""
    assert shown[4][3].startswith("loss 0.5000")
    clear_step(folder)  # as when the workers start again
    assert read_step(folder) is None
    folder.step.write_text("7")  # cut short
    follow()
    assert shown[-1][:3] == ("run", 4, 10)


def test_search_shows_trials_that_ended_and_steps_of_those_that_run(tmp_path):
    folder, shown = SearchFolder(tmp_path), []
    trials = sample_trials(load_config(None), SearchConfig(num_trials=3))
    follow = SearchFollower(folder, trials, "search", lambda *shows: shown.append(shows))
    follow()
    assert shown == []
    for trial in trials[:2]:
        run = folder.run_of(trial)
        run.root.mkdir(parents=True)
        (run.root / "busy").touch()
    append_progress(folder.run_of(trials[0]), record(4))
    follow()
    assert shown == [("search", 0, 3, f"trials ended  {trials[0].name} 4/10, {trials[1].name} starting")]
    write_record(folder, TrialRecord(trial=trials[0], state="finished", step=10, total_steps=10, held_out_loss=0.5))
    follow()
    assert shown[1:] == [("search", 1, 3, f"trials ended  {trials[1].name} starting")]


def test_phase_of_the_workers_start_is_named_once_before_the_first_step(tmp_path):
    folder, did = RunFolder(tmp_path), []
    follow = Follower(folder, "run", lambda *_shows: None, lambda _line: None, str, did.append)
    clock = StartClock("data", on_phase=lambda name: write_note(folder, clock, name))
    follow()
    write_note(folder, clock, "data")
    for name in ("base", "compiling and first step"):
        follow()
        follow()
        clock.enter(name)
    follow()
    StepMark(folder, 10).tick(1)
    clock.enter("adapter")
    follow()
    assert did == ["reading the data", "loading the base", "compiling and first step"]
