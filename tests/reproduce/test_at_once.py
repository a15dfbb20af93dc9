"""Several steps at once: order, stops and resumption, with invented steps and with real ones on the tiny base."""

from __future__ import annotations

import io
import re
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console

from finlora.errors import ResourceError
from finlora.report.write import render_report
from finlora.reproduce import at_once
from finlora.reproduce.at_once import choose_next, run_plan
from finlora.reproduce.outcomes import (
    Outcome,
    StepState,
    delete_weights,
    outcome_table,
    read_outcome,
    read_outcomes,
    to_do,
)
from finlora.reproduce.paper_rows import make_plan
from finlora.results import read_results
from finlora.train.run.run_folder import RunFolder

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


class Invented:
    """Actors whose steps end in the order in which they started, one at each look."""

    def __init__(self, ends=lambda _step: True):
        self.running, self.started, self.killed, self.most = [], [], [], 0
        self._ends = ends

    def __call__(self, _output, _announce):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def start(self, step):
        self.running.append(step)
        self.started.append(step.name)
        self.most = max(self.most, len(self.running))

    def kill(self, step):
        self.running.remove(step)
        self.killed.append(step.name)

    def collect(self, _seconds):
        step = next((step for step in self.running if self._ends(step)), None)
        if step is None:
            return []
        self.running.remove(step)
        return [Outcome(name=step.name, key=step.key, state=StepState.DONE)]


@pytest.fixture
def plan(tmp_path):
    """Two rows of two seeds: training and evaluation each."""
    return make_plan(CONFIGS, tmp_path, [], "llama-8b-4bit-r4-f[pi]*", seeds=[3, 4])


def play(monkeypatch, plan, output, actors, **options):
    monkeypatch.setattr(at_once, "_StepActors", actors)
    lines = []
    return run_plan(plan, output, lines.append, **options), lines


def test_evaluation_follows_its_training_and_no_more_run_than_asked(monkeypatch, plan, tmp_path):
    actors = Invented()
    ended, lines = play(monkeypatch, plan, tmp_path, actors, at_once=3)
    assert ended.stop is None
    assert {outcome.state for outcome in ended.outcomes} == {"done"}
    assert actors.most == 3
    for step in plan:
        if step.kind == "evaluate":
            train = f"{step.config.name}-train"
            done = next(index for index, line in enumerate(lines) if f"{train}: done" in line)
            assert done < next(index for index, line in enumerate(lines) if line.endswith(f" {step.name}"))
    again = Invented()
    assert play(monkeypatch, plan, tmp_path, again)[0].stop is None
    assert again.started == []


def test_choice_skips_what_waits_for_a_running_training(plan):
    train, evaluate, *_ = plan
    assert choose_next([train, evaluate], []) is train
    assert choose_next([evaluate], [train]) is None
    assert choose_next([evaluate, plan[2]], [train]) is plan[2]
    assert choose_next([evaluate], []) is evaluate


def test_end_of_time_starts_nothing_and_says_what_is_left(monkeypatch, plan, tmp_path):
    actors = Invented(ends=lambda step: step is plan[0])
    ended, _ = play(monkeypatch, plan, tmp_path, actors, at_once=2, deadline=time.monotonic() + 0.1)
    assert ended.stop.exit_code == 75
    assert str(ended.stop) == (
        f"Stopped by --minutes: 1 of {len(plan)} steps have ended, {len(plan) - 1} are left. The same command goes on."
    )
    assert actors.started[0] == plan[0].name
    assert actors.killed == actors.started[1:]  # what has not begun has nothing to save
    assert read_outcome(tmp_path, plan[2]).state == "to do"
    late = Invented()
    play(monkeypatch, plan, tmp_path, late, deadline=time.monotonic() - 1)
    assert late.started == []


def test_signal_lets_trainings_save_and_names_itself(monkeypatch, plan, tmp_path):
    folder = RunFolder(plan[0].adapter.parent)

    def saves(step):
        return step is plan[0] and folder.stop.is_file()

    actors = Invented(ends=saves)

    def begin(_ended, _all, _note):
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.step.write_text("7 9")
        (tmp_path / "stop").write_text("SIGTERM")

    ended, _ = play(monkeypatch, plan, tmp_path, actors, at_once=2, on_progress=begin)
    assert folder.stop.read_text() == "SIGTERM"
    assert ended.stop.exit_code == 143
    assert actors.killed == [plan[2].name]


def test_training_that_does_not_save_in_time_is_ended(monkeypatch, plan, tmp_path):
    monkeypatch.setattr(at_once, "_CHECKPOINT_S", 0.0)
    monkeypatch.setattr(at_once, "has_begun", lambda _step: True)
    actors = Invented(ends=lambda _step: False)
    ended, _ = play(monkeypatch, plan[:1], tmp_path, actors, deadline=time.monotonic() + 0.1)
    assert actors.killed == [plan[0].name]
    assert ended.outcomes == [to_do(plan[0], ended.outcomes[0].cause)]


def test_second_command_in_a_folder_is_refused(plan, tmp_path):
    with at_once._claim(tmp_path), pytest.raises(ResourceError, match="another `finlora reproduce` works in"):
        run_plan(plan, tmp_path)


@pytest.fixture(scope="module")
def reproduced(ray_instance, tiny_base, prepared_fpb, tmp_path_factory):
    """Two trainings at once, stopped when the first has begun; then its row and others, to their ends.

    Gives the folder, the row's steps and others, both ends, the lines, and a function that plans the same for a folder.
    """
    from finlora.train.run.wait_for_gpus import free_orphans

    output, lines = tmp_path_factory.mktemp("reproduce"), []
    overrides = [
        *("model.compute_dtype=float32", "model.template=raw", f"data.dir={prepared_fpb}", "train.device=cpu"),
        # Enough steps for the stop to come between, small ones, and few ends of epochs with their checkpoints.
        *("train.precision=fp32", "train.global_batch_size=2", "train.epochs=200", "train.max_steps=300"),
        *("eval.device=cpu", "data.max_train_examples=240", "data.max_test_examples=12", "max_wait_s=60"),
    ]

    def plan(only, folder=output):
        return make_plan(CONFIGS, folder, overrides, only, {"135m": str(tiny_base)}, seeds=[0, 1])

    both = plan("smollm2-135m-4bit-r4-fpb-seed?-*")

    def stop_when_one_has_begun(_ended, _all, _note):
        if any(at_once.has_begun(step) for step in both):
            (output / "stop").write_text("--minutes")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(at_once, "_POLL_S", 0.1)  # so that the stop comes early in the training
        stopped = run_plan(both, output, lines.append, at_once=2, on_progress=stop_when_one_has_begun)
    free_orphans()  # of killed steps; a command's end frees them
    saved = next(outcome.name for outcome in stopped.outcomes if "which is saved" in outcome.cause)

    def remake(folder):
        rows = (saved.replace("train", "*"), "smollm2-135m-4bit-r4-tfns-seed0-*", "smollm2-135m-base-8bit-fpb-*")
        return [step for row in rows for step in plan(row, folder)]

    ended = run_plan(remake(output), output, lines.append, at_once=2)
    return output, remake(output), stopped, ended, lines, remake


@pytest.mark.ray
def test_stopped_plan_resumes_and_completes(reproduced):
    output, steps, stopped, ended, lines, _ = reproduced
    assert stopped.stop.exit_code == 75
    assert {outcome.state for outcome in stopped.outcomes} == {"to do"}
    assert ended.stop is None
    assert {outcome.name: outcome.state for outcome in ended.outcomes} == {
        steps[0].name: "done",
        steps[1].name: "done",
        "smollm2-135m-4bit-r4-tfns-seed0-train": "cannot run",
        "smollm2-135m-4bit-r4-tfns-seed0-evaluate": "cannot run",
        "smollm2-135m-base-8bit-fpb-evaluate": "done",
    }
    (training,) = [result for result in read_results(output / "runs") if result.kind == "training"]
    assert training.attempts == 2  # it resumed
    assert training.config["seed"] == steps[0].config.seed
    found = [re.search(r"Stopped by --minutes at step (\d+) of 300, which is saved", line) for line in lines]
    assert all(0 < int(match[1]) < 300 for match in found if match)
    causes = {outcome.name: outcome.cause for outcome in ended.outcomes}
    assert "Run `finlora prepare tfns" in causes["smollm2-135m-4bit-r4-tfns-seed0-train"]
    assert all(outcome.seconds > 0 for outcome in ended.outcomes if outcome.state == "done")
    assert {path.stem for path in output.glob("steps/*.log")} >= {step.name for step in steps}


@pytest.mark.ray
def test_copied_results_are_enough_and_weights_can_go(reproduced, tmp_path):
    output, _, _, ended, _, remake = reproduced
    for path in (*output.glob("steps/*.json"), *output.glob("runs/*/results.jsonl")):
        copy = tmp_path / path.relative_to(output)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    there = remake(tmp_path)
    done = [step for step in there if "-tfns-" not in step.name]
    assert {outcome.state for outcome in read_outcomes(tmp_path, done).values()} == {"done"}
    assert run_plan(done, tmp_path).stop is None
    assert len(read_results(tmp_path)) == len(read_results(output)) == 3
    # Without its evaluation a training is to do again: its adapter is wanted.
    only = [step for step in done if step.kind == "train"]
    assert {outcome.state for outcome in read_outcomes(tmp_path, only).values()} == {"to do"}
    whole = tmp_path / "whole"
    shutil.copytree(output, whole)
    delete_weights(remake(whole), {outcome.name: outcome for outcome in ended.outcomes})
    row = remake(whole)[0].run.root
    assert [path.name for path in row.iterdir() if path.name == "adapter" or path.name.startswith("checkpoint_")] == []
    assert {outcome.name: outcome.state for outcome in read_outcomes(whole, remake(whole)).values()} == {
        outcome.name: outcome.state for outcome in ended.outcomes
    }


@pytest.mark.ray
def test_report_begins_with_the_steps_and_lists_deviations(reproduced, tmp_path):
    output, _, _, ended, _, _ = reproduced
    stream = io.StringIO()
    render_report(
        read_results(output / "runs"), tmp_path, Console(file=stream, width=140), [outcome_table(ended.outcomes)]
    )
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("## Steps of the reproduction") < text.index("## Evaluation")
    assert "3 done, 2 cannot run." in text
    assert "## Settings other than the paper's" in text
    assert "## Where ours may differ from the paper's" in text
    assert "Steps of the reproduction" in stream.getvalue()


@pytest.mark.ray
def test_step_whose_process_ends_is_failed_and_the_next_gets_another(reproduced, tmp_path):
    import ray

    _, steps, *_ = reproduced
    with at_once._StepActors(tmp_path, print) as actors:
        actors.start(steps[0])
        (running,) = actors._running.values()
        ray.kill(running.actor)
        outcomes = []
        while not outcomes:
            outcomes = actors.collect(1.0)
        assert (outcomes[0].state, outcomes[0].name) == ("failed", steps[0].name)
        assert outcomes[0].cause.startswith("its process ended: ")
        assert actors.running == actors._idle == []
