"""Part of the plan on the tiny base, really trained and scored: finished steps are not repeated, others say why not."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
from rich.console import Console

from finlora.report.write import render_report
from finlora.reproduce.outcomes import (
    find_obstacle,
    foresee,
    lacks_adapter,
    outcome_table,
    read_outcome,
    write_outcome,
)
from finlora.reproduce.paper_rows import make_plan
from finlora.results import read_results

pytestmark = pytest.mark.ray

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


@pytest.fixture(scope="module")
def reproduced(ray_instance, tiny_base, prepared_fpb, tmp_path_factory):
    """Folder, plan, outcomes and the lines said."""
    from finlora.reproduce.run_rows import run_plan

    output, lines = tmp_path_factory.mktemp("reproduce"), []
    overrides = [
        *(f"model.base={tiny_base}", "model.compute_dtype=float32", f"data.dir={prepared_fpb}", "train.device=cpu"),
        *("train.num_workers=1", "train.precision=fp32", "train.global_batch_size=8", "train.max_steps=2"),
        *("eval.device=cpu", "data.max_train_examples=16", "data.max_test_examples=12", "max_wait_s=60"),
    ]
    steps = make_plan(CONFIGS, output, overrides, "llama-8b-4bit-r4-f[pi]*")
    steps += make_plan(CONFIGS, output, overrides, "llama-8b-base-fpb-*")
    return output, steps, run_plan(steps, output, lines.append), lines


def test_steps_run_and_what_cannot_run_says_why(reproduced, prepared_fpb):
    _, steps, outcomes, lines = reproduced
    states = {outcome.name: outcome.state for outcome in outcomes}
    assert states == {
        "llama-8b-4bit-r4-fpb-train": "done",
        "llama-8b-4bit-r4-fpb-evaluate": "done",
        "llama-8b-4bit-r4-fiqa-train": "cannot run",
        "llama-8b-4bit-r4-fiqa-evaluate": "cannot run",
        "llama-8b-base-fpb-evaluate": "done",
    }
    causes = {outcome.name: outcome.cause for outcome in outcomes}
    assert "Run `finlora prepare fiqa_paper" in causes["llama-8b-4bit-r4-fiqa-train"]
    assert causes["llama-8b-4bit-r4-fpb-train"] == ""
    assert lines[0] == f"[1/{len(steps)}] llama-8b-4bit-r4-fpb-train"
    assert all(outcome.seconds > 0 for outcome in outcomes if outcome.state == "done")


def test_what_is_done_is_not_redone(reproduced):
    from finlora.reproduce.run_rows import run_plan

    output, steps, outcomes, _ = reproduced
    before = [result.created for result in read_results(output / "runs")]
    lines = []
    again = run_plan(steps, output, lines.append)
    assert [(each.name, each.state) for each in again] == [(each.name, each.state) for each in outcomes]
    assert [result.created for result in read_results(output / "runs")] == before
    assert len(before) == 3
    assert [line for line in lines if "fpb" in line] == []  # only what could not run was looked at again


def test_other_settings_or_a_lost_adapter_make_a_step_to_do(reproduced):
    output, (train, evaluate, *_), _, _ = reproduced
    changed = dataclasses.replace(
        evaluate,
        config=dataclasses.replace(
            evaluate.config, data=dataclasses.replace(evaluate.config.data, max_test_examples=3)
        ),
    )
    assert read_outcome(output, evaluate).state == "done"
    assert read_outcome(output, changed).state == "to do"
    mark = train.adapter / "finlora.yaml"
    kept = mark.rename(mark.with_suffix(".kept"))
    assert read_outcome(output, train).state == "to do"
    assert lacks_adapter(evaluate)
    assert [each.state for each in foresee([train, evaluate], output)] == ["to do", "done"]
    assert [each.state for each in foresee([train, changed], output)] == ["to do", "to do"]
    assert [each.state for each in foresee([changed], output)] == ["waits for its training"]
    kept.rename(mark)
    assert not lacks_adapter(evaluate)
    assert find_obstacle(evaluate) is None


def test_step_that_breaks_is_kept_as_failed_and_the_others_go_on(reproduced, monkeypatch):
    from finlora.reproduce import run_rows

    output, steps, _, _ = reproduced

    def explode(*_arguments):
        raise RuntimeError("the cable was pulled")

    monkeypatch.setattr(run_rows, "_evaluate", explode)
    wanted = [dataclasses.replace(step, name=f"again-{step.name}") for step in steps if step.kind == "evaluate"]
    outcomes = run_rows.run_plan(wanted, output, lambda _line: None)
    assert [each.state for each in outcomes] == ["failed", "cannot run", "failed"]
    assert outcomes[0].cause == "RuntimeError: the cable was pulled"
    assert read_outcome(output, wanted[0]) == outcomes[0]


def test_report_begins_with_the_steps_and_explains_differences(reproduced, tmp_path):
    output, _, outcomes, _ = reproduced
    stream = io.StringIO()
    console = Console(file=stream, width=140)
    render_report(read_results(output / "runs"), tmp_path, console, [outcome_table(outcomes)])
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.index("## Steps of the reproduction") < text.index("## Evaluation")
    assert "3 done, 2 cannot run." in text
    assert "## Where ours may differ from the paper's" in text
    assert "Steps of the reproduction" in stream.getvalue()
    assert "Steps of the reproduction" in (tmp_path / "report.html").read_text(encoding="utf-8")
    write_outcome(output, outcomes[0])
