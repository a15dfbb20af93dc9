"""Tables and verdicts of the benchmark on real tasks, from invented results."""

from __future__ import annotations

import dataclasses

import comparison

from finlora.results import Result


def evaluation(variant, accuracy, bits=4, name="adamw", seed=0):
    scores = dict.fromkeys(("accuracy", "strict_accuracy", "weighted_f1"), accuracy)
    bounds = {f"{key}_{end}": accuracy + step for key in scores for end, step in (("low", -0.02), ("high", 0.02))}
    return Result(
        kind="evaluation",
        task="fpb",
        variant=variant,
        base="base",
        bits=bits,
        adapter=None if variant == "base" else f"{variant}-{name}-{seed}",
        num_examples=1212,
        metrics=scores | bounds,
        counts={
            "neutral": {"neutral": 500, "positive": 229},
            "positive": {"positive": 338},
            "negative": {"neutral": 145},
        },
        config={"optim": {"name": name}, "seed": seed, "train": {"num_workers": 2}},
    )


def training(scored, losses):
    return dataclasses.replace(
        scored,
        kind="training",
        metrics={"loss_first": losses[0], "loss_last": losses[-1]},
        loss_curve=[[10.0 * step, loss] for step, loss in enumerate(losses, 1)],
        wire=[{"rounds": 30, "bytes_sent": 9000, "seconds": 2.5}, {"rounds": 30, "bytes_sent": 9001, "seconds": 1.25}],
        wall_seconds=61.0,
    )


RESULTS = [
    *(evaluation("base", 0.25 + bits / 1000, bits) for bits in (16, 8, 4)),
    evaluation("16bit-r4", 0.75, 16),
    evaluation("8bit-r8", 0.72, 8),
    *(evaluation("4bit-r4", 0.74, 4, name, seed) for name in ("adamw", "zero_one_adam") for seed in (0, 1)),
]
RESULTS += [training(scored, [6.0, 0.4, 0.2, 0.1]) for scored in RESULTS if scored.variant != "base"]


def test_adapters_come_below_their_bases_with_intervals_and_cost():
    text = comparison.compare_adapters(RESULTS, ["fpb"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| fpb")]
    models = ["base, 16 bit", "base, 8 bit", "base, 4 bit", "16bit-r4", "8bit-r8", "4bit-r4"]
    assert [row[1] for row in rows] == models
    assert rows[3][2:8] == ["1,212", *["75.0 (73.0-77.0)"] * 3, "6.000 -> 0.100", "61"]
    assert rows[0][6] == ""
    assert len({len(line) for line in text.splitlines() if line.startswith("|")}) == 1


def test_checks_say_what_holds_and_what_does_not():
    lines = comparison.check_adapters(RESULTS, ["fpb"])
    assert "- holds: fpb: 4bit-r4 is above every base (intervals do not overlap) (72.0 against 28.6)" in lines
    assert "- holds: fpb: 4bit-r4 is above always answering the commonest label (72.0 against 60.1)" in lines
    assert "- holds: fpb: 4bit-r4 is inside the 95 % interval of 16bit-r4 (74.0 in 73.0-77.0)" in lines
    assert "- DOES NOT HOLD: fpb: 8bit-r8 is inside the 95 % interval of 16bit-r4 (72.0 in 73.0-77.0)" in lines
    assert all(line.startswith("- not measured: tfns") for line in comparison.check_adapters(RESULTS, ["tfns"]))


def test_optimisers_are_shown_side_by_side_by_seed_and_in_the_mean():
    text = comparison.compare_optimizers(RESULTS, ["fpb"])
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| fpb")]
    assert [row[1:3] for row in rows] == [[t, s] for t in ("AdamW", "0/1 Adam") for s in ("0", "1", "mean")]
    assert rows[0][4:6] == ["74.0 (72.0-76.0)", "6.000 0.400 0.200 0.100"]
    assert rows[0][6:] == rows[2][6:] == ["30", "9,001", "1.250"]  # the busiest worker, the least waiting
    assert rows[2][4] == "74.0 ± 0.0"
    (line,) = comparison.check_optimizers(RESULTS, ["fpb"])
    assert line.startswith("- holds: fpb: 0/1 Adam's mean accuracy is not below")


def test_loss_curves_are_drawn_where_there_are_any(tmp_path):
    assert not comparison.plot_optimizers([], ["fpb"], tmp_path / "none.png")
    assert comparison.plot_optimizers(RESULTS, ["fpb", "tfns"], tmp_path / "some.png")
    assert (tmp_path / "some.png").stat().st_size > 5000
