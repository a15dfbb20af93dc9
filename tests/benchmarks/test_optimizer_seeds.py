"""AdamW beside 0/1 Adam over seeds: rows are paired by seed, shares fit a GPU, and the plan differs in what it says alone."""

from __future__ import annotations

import math
from argparse import Namespace

import optimizer_seeds
import pytest

from finlora.configfile import config_to_tree
from finlora.results import Result


def make_options(tmp_path, **changes):
    values = {
        "base": tmp_path / "base",
        "data": tmp_path / "data",
        "output": tmp_path / "out",
        "tasks": ("fpb", "ner"),
        "seeds": (0, 1),
        "workers": (2, 4),
        "rates": (),
        "device": "cuda",
        "gpus": 1,
        "at_once": 6,
        "set": [],
    }
    return Namespace(**{**values, **changes})


def make_run(optimizer, seed, accuracy, workers=2, sent=8):
    config = {"seed": seed, "optim": {"name": optimizer, "learning_rate": 5e-4}, "train": {"num_workers": workers}}
    name = f"fpb-{optimizer}-w{workers}-seed{seed}"
    wire = [{"bytes_sent": sent, "bytes_adam": 100}] * workers
    curve = [[float(step), 1.0 / step] for step in range(1, 9)]
    common = {"task": "fpb", "variant": "4bit-r4", "base": "base", "bits": 4, "run": name, "config": config}
    return [
        Result(kind="training", wire=wire, loss_curve=curve, wall_seconds=10.0, **common),
        Result(kind="evaluation", metrics={"accuracy": accuracy}, **common),
    ]


def test_plan_has_both_optimisers_of_a_seed_in_turn_and_equal_settings_else(tmp_path):
    steps = list(optimizer_seeds.plan(make_options(tmp_path)))
    assert len(steps) == 2 * 2 * 2 * 2 * 2
    assert [step.name for step in steps[:4]] == [
        "fpb-adamw-w2-seed0-train",
        "fpb-adamw-w2-seed0-evaluate",
        "fpb-zero_one_adam-w2-seed0-train",
        "fpb-zero_one_adam-w2-seed0-evaluate",
    ]
    adamw, zero_one = (config_to_tree(steps[number].config) for number in (0, 2))
    assert (zero_one["optim"]["name"], zero_one["optim"]["learning_rate"]) == ("zero_one_adam", 7e-4)
    for tree in (adamw, zero_one):
        del tree["name"], tree["optim"]["name"], tree["optim"]["learning_rate"]
    assert adamw == zero_one


def test_a_given_rate_wins(tmp_path):
    options = make_options(tmp_path, rates=[("zero_one_adam", 1e-3)])
    rates = {step.config.optim.name: step.config.optim.learning_rate for step in optimizer_seeds.plan(options)}
    assert rates == {"adamw": 5e-4, "zero_one_adam": 1e-3}


@pytest.mark.parametrize("at_once", [1, 3, 6, 7])
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("gpus", [1, 2])
def test_shares_of_all_that_runs_at_once_fit_and_never_ask_nccl_for_two_ranks_on_a_gpu(at_once, workers, gpus):
    worker, scoring = (float(each.split("=")[1]) for each in optimizer_seeds.shares(at_once, workers, gpus))
    assert at_once * workers * worker <= gpus
    assert at_once * scoring <= gpus
    assert 0 < worker < 1, "gloo"
    assert optimizer_seeds.shares(at_once, workers, 0) == []


def test_difference_is_paired_by_seed_with_students_interval():
    """Gaps of 1, 2 and 3 points: mean 2, and t(0.975, 2) = 4.3027 (tables of Student's t) times 1 / sqrt(3)."""
    results = [*make_run("adamw", 0, 0.80), *make_run("adamw", 1, 0.82), *make_run("adamw", 2, 0.84)]
    results += [
        *make_run("zero_one_adam", 2, 0.87),
        *make_run("zero_one_adam", 1, 0.84),
        *make_run("zero_one_adam", 0, 0.81),
    ]
    results += make_run("zero_one_adam", 3, 0.5)  # no AdamW of this seed
    mean, half, num_seeds = optimizer_seeds.difference(optimizer_seeds.pair(results)["fpb", 2])
    assert (mean, num_seeds) == (pytest.approx(2.0), 3)
    assert half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)
    table = optimizer_seeds.render(results)
    assert "+2.00 ± 2.48 (3 seeds)" in table
    assert "8.0%" in table


def test_workers_are_rows_of_their_own_and_one_seed_has_no_interval():
    results = [
        *make_run("adamw", 0, 0.80, workers=4),
        *make_run("zero_one_adam", 0, 0.79, workers=4),
        *make_run("adamw", 0, 0.9),
    ]
    pairs = optimizer_seeds.pair(results)
    assert sorted(pairs) == [("fpb", 2), ("fpb", 4)]
    mean, half, num_seeds = optimizer_seeds.difference(pairs["fpb", 4])
    assert (mean, num_seeds) == (pytest.approx(-1.0), 1)
    assert math.isnan(half)
    assert math.isnan(optimizer_seeds.difference(pairs["fpb", 2])[0])
    assert optimizer_seeds.last_quarter(results[0]) == pytest.approx((1 / 7 + 1 / 8) / 2)
