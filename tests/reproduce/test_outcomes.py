"""Records of steps: which ones count, which steps run again, and the forecast of a plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from finlora.errors import ResultError
from finlora.reproduce.outcomes import (
    Outcome,
    StepState,
    delete_weights,
    foresee,
    outcome_table,
    read_outcome,
    read_outcomes,
    write_outcome,
)
from finlora.reproduce.paper_rows import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


@pytest.fixture
def plan(tiny_base, prepared_fpb, tmp_path):
    """Make the steps of one row with other settings."""

    def make(*overrides):
        own = [f"data.dir={prepared_fpb}", *overrides]
        return make_plan(CONFIGS, tmp_path, own, "llama-8b-4bit-r4-fpb-*", {"8b": str(tiny_base)})

    return make


def end(output, *steps, state=StepState.DONE):
    for step in steps:
        write_outcome(output, Outcome(name=step.name, key=step.key, state=state, seconds=3.0))


def put_adapter(step):
    step.adapter.mkdir(parents=True)
    (step.adapter / "finlora.yaml").touch()


def states(outcomes):
    return [outcome.state for outcome in (outcomes.values() if isinstance(outcomes, dict) else outcomes)]


def test_step_with_other_settings_runs_again(plan, tmp_path):
    _, evaluate = plan()
    end(tmp_path, evaluate)
    assert read_outcome(tmp_path, evaluate).seconds == 3.0
    assert read_outcome(tmp_path, plan("data.max_test_examples=3")[1]).state == "to do"


def test_lost_adapter_is_trained_again_only_if_a_score_needs_it(plan, tmp_path):
    steps = plan()
    end(tmp_path, steps[0])
    assert states(read_outcomes(tmp_path, steps)) == ["to do", "to do"]
    put_adapter(steps[0])
    assert states(read_outcomes(tmp_path, steps)) == ["done", "to do"]
    end(tmp_path, steps[1])
    (steps[0].adapter / "finlora.yaml").unlink()
    assert states(read_outcomes(tmp_path, steps)) == ["done", "done"]
    assert states(foresee(steps, tmp_path)) == ["done", "done"]
    assert states(read_outcomes(tmp_path, steps[:1])) == ["to do"]
    assert states(foresee(plan("eval.batch_size=3"), tmp_path)) == ["to do", "to do"]
    assert states(foresee(plan("eval.batch_size=3")[1:], tmp_path)) == ["waits for its training"]


def test_only_weights_of_rows_that_are_scored_are_deleted(plan, tmp_path):
    steps = plan()
    put_adapter(steps[0])
    checkpoint = steps[0].adapter.parent / "checkpoint_1"
    checkpoint.mkdir()
    (steps[0].adapter.parent / "results.jsonl").touch()
    end(tmp_path, steps[0])
    delete_weights(steps, read_outcomes(tmp_path, steps))
    assert steps[0].adapter.is_dir()
    end(tmp_path, steps[1])
    delete_weights(steps[:1], read_outcomes(tmp_path, steps[:1]))
    assert steps[0].adapter.is_dir()  # nothing says that it was scored
    delete_weights(steps, read_outcomes(tmp_path, steps))
    assert sorted(path.name for path in steps[0].adapter.parent.iterdir()) == ["results.jsonl"]


def test_damaged_record_is_refused_by_name(plan, tmp_path):
    end(tmp_path, plan()[1])
    path = tmp_path / "steps" / f"{plan()[1].name}.json"
    path.write_text(path.read_text().replace("3.0", "4.0"))
    with pytest.raises(ResultError, match=r"evaluate\.json is damaged .* delete that file to repeat the step"):
        read_outcomes(tmp_path, plan())


def test_table_groups_steps_of_equal_state_and_cause(plan, tmp_path):
    end(tmp_path, plan()[0], state=StepState.CANNOT_RUN)
    end(tmp_path, plan()[1], state=StepState.CANNOT_RUN)
    table = outcome_table(list(read_outcomes(tmp_path, plan()).values()))
    assert [row[1] for row in table.rows] == ["cannot run: 2"]
    assert table.notes == ("2 cannot run.",)
