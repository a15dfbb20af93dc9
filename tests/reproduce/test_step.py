"""Key of a step, which covers all that affects its outcome, and shares of GPUs with which several steps fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finlora.reproduce.paper_rows import make_plan
from finlora.reproduce.step import identify_base, share_gpus

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def plan(output, *overrides, only="llama-8b-4bit-r4-fpb-*", **options):
    return make_plan(CONFIGS, output, overrides, only, **options)


def test_key_is_the_same_on_another_machine(tmp_path, tiny_base):
    copy = shutil.copytree(tiny_base, tmp_path / "elsewhere")
    here = plan(tmp_path / "a", "data.dir=/a", bases={"8b": str(tiny_base)})
    there = plan(tmp_path / "b", "data.dir=/b", "max_wait_s=5", "eval.num_gpus=0.5", bases={"8b": str(copy)})
    assert [step.key for step in here] == [step.key for step in there]
    assert [step.key for step in here] != [step.key for step in plan(tmp_path / "a", "data.dir=/a")]


def test_key_of_a_training_is_not_that_of_its_scores(tmp_path):
    train, evaluate = plan(tmp_path)
    again, other = plan(tmp_path, "eval.bits=4")
    assert (train.key == again.key, evaluate.key == other.key) == (True, False)
    assert train.key != plan(tmp_path, "train.epochs=1")[0].key


def test_folder_that_is_no_base_is_named_by_its_path(tmp_path):
    (step, _) = plan(tmp_path, bases={"8b": str(tmp_path)})
    assert identify_base(step.config.model) == str(tmp_path)


@pytest.mark.parametrize(
    ("at_once", "num_gpus", "share"), [(1, 1.0, 1.0), (8, 1.0, 0.125), (3, 1.0, 0.3333), (3, 2.0, 0.5), (4, 8.0, 1.0)]
)
def test_share_lets_as_many_steps_fit_as_are_asked_for(tmp_path, at_once, num_gpus, share):
    step = share_gpus(plan(tmp_path), at_once, num_gpus)[0]
    assert (step.config.train.gpus_per_worker, step.config.eval.num_gpus) == (share, share)


def test_share_that_the_user_sets_stays_and_a_cpu_has_none(tmp_path):
    own = share_gpus(plan(tmp_path, "train.gpus_per_worker=0.5", "eval.device=cpu"), 8, 1.0)[0].config
    assert (own.train.gpus_per_worker, own.eval.num_gpus) == (0.5, 1.0)
    assert share_gpus(plan(tmp_path), 8, 0.0) == plan(tmp_path)
