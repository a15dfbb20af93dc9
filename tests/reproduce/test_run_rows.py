"""One step: its error becomes its outcome, and a finished training is not repeated."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from finlora.errors import StoppedError
from finlora.evaluate.answer_table import read_answer_table
from finlora.reproduce import run_rows
from finlora.reproduce.paper_rows import make_plan
from finlora.results import read_results

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


@pytest.fixture
def steps(tiny_base, prepared_fpb, tmp_path):
    """Training and evaluation of an adapter, and the evaluation of its base."""
    overrides = [f"data.dir={prepared_fpb}", "train.device=cpu", "eval.device=cpu", "model.compute_dtype=float32"]
    return [
        make_plan(CONFIGS, tmp_path, overrides, name, bases={"8b": str(tiny_base)})[0]
        for name in ("llama-8b-4bit-r4-fpb-train", "llama-8b-4bit-r4-fpb-evaluate", "llama-8b-base-fpb-evaluate")
    ]


def test_failed_step_is_recorded_and_its_log_has_the_traceback(steps, monkeypatch):
    def explode(*_arguments):
        raise RuntimeError("the cable was pulled")

    monkeypatch.setattr(run_rows, "_evaluate", explode)
    lines = []
    outcome = run_rows.run_step(steps[2], lines.append)
    assert (outcome.state, outcome.cause) == ("failed", "RuntimeError: the cable was pulled")
    assert "in explode" in "".join(lines)
    assert run_rows.run_step(steps[1], lines.append).state == "waits for its training"


def test_stopped_training_is_left_to_do(steps, monkeypatch):
    from finlora.train import worker

    def stop(*_arguments):
        raise StoppedError("Stopped by SIGTERM at step 5 of 9, which is saved.")

    monkeypatch.setattr(worker, "run_training", stop)
    outcome = run_rows.run_step(steps[0], print)
    assert (outcome.state, outcome.cause) == ("to do", "Stopped by SIGTERM at step 5 of 9, which is saved.")


def test_training_that_has_ended_is_not_repeated(steps, monkeypatch):
    from finlora.results import Result
    from finlora.train import worker

    ended = Result(kind="training", task="fpb", variant="4bit-r4", base="tiny", bits=4, wall_seconds=12.5)
    monkeypatch.setattr(run_rows, "find_finished", lambda _folder: ended)
    monkeypatch.setattr(worker, "run_training", lambda *_: pytest.fail("it was trained again"))
    outcome = run_rows.run_step(steps[0], print)
    assert (outcome.state, outcome.seconds) == ("done", 12.5)


def test_training_in_a_folder_of_other_settings_cannot_run(steps):
    from finlora.configfile import save_config

    step = steps[0]
    folder = step.adapter.parent
    folder.mkdir(parents=True)
    save_config(step.config, folder / "config.yaml")
    text = (folder / "config.yaml").read_text().replace("epochs: 4", "epochs: 3")
    (folder / "config.yaml").write_text(text)
    outcome = run_rows.run_step(step, print)
    assert outcome.state == "cannot run"
    assert "train.epochs: 3 there, 4 here" in outcome.cause


def test_evaluation_keeps_its_answers(steps, monkeypatch):
    """In this process: Ray only gives it room."""
    step = steps[2]
    model = dataclasses.replace(step.config.model, template="raw")
    data = dataclasses.replace(step.config.data, max_test_examples=3)
    scoring = dataclasses.replace(step.config.eval, bits=16)
    step = dataclasses.replace(step, config=dataclasses.replace(step.config, model=model, data=data, eval=scoring))
    monkeypatch.setattr(run_rows.connect, "call", lambda function, *arguments, **_options: function(*arguments))
    outcome = run_rows.run_step(step, print)
    assert (outcome.state, outcome.cause) == ("done", "")
    (result,) = read_results(step.run.results)
    assert len(read_answer_table(step.run.answers / result.answers, result.answers_hash)) == 3
