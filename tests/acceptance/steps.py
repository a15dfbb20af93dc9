"""All steps of the acceptance walk, in the order of the table; those needed come before those that need them."""

from __future__ import annotations

from acceptance import answering, preparing, searching, serving, training
from acceptance.schedule import Step

STEPS: tuple[Step, ...] = (
    Step(name="prepare", run=preparing.prepare, needs_ray=False, makes=("data",)),
    Step(name="train-main", run=training.train_main, needs=("prepare",), makes=("runs/main",)),
    Step(
        name="train-16-adamw", run=training.short_run(16, "adamw"), needs=("prepare",), makes=("runs/short-16-adamw",)
    ),
    Step(
        name="stop-resume",
        run=training.stop_and_resume,
        needs_ray=False,
        needs=("prepare",),
        makes=(
            "runs/stopped",
            "runs/undisturbed",
        ),
    ),
    Step(name="evaluate-base", run=answering.evaluate_base, needs_ray=False, needs=("prepare",), makes=("runs/base",)),
    Step(name="xbrl", run=answering.xbrl, needs=("prepare",), makes=("runs/xbrl*",)),
    Step(
        name="evaluate", run=answering.evaluate_adapter, needs=("train-main", "evaluate-base"), makes=("runs/main-*",)
    ),
    Step(name="serve", run=serving.serve, needs=("train-main", "train-16-adamw"), makes=("serve",)),
    Step(
        name="merge",
        run=answering.merge,
        needs_ray=False,
        needs=("train-16-adamw",),
        makes=(
            "merged",
            "runs/beside",
            "runs/merged",
        ),
    ),
    Step(name="ask", run=answering.ask, needs=("train-main",)),
    Step(
        name="text",
        run=answering.evaluate_text,
        needs_ray=False,
        needs=("train-main", "evaluate-base"),
        makes=(
            "runs/text",
            "runs/base-text",
        ),
    ),
    Step(name="tune", run=searching.tune, needs=("prepare",), makes=("runs/search",)),
    Step(name="reproduce", run=searching.reproduce, needs=("prepare",), makes=("reproduce",)),
    Step(name="train-8-adamw", run=training.short_run(8, "adamw"), needs=("prepare",), makes=("runs/short-8-adamw",)),
    Step(name="train-4-adamw", run=training.short_run(4, "adamw"), needs=("prepare",), makes=("runs/short-4-adamw",)),
    Step(
        name="train-16-zero_one",
        run=training.short_run(16, "zero_one_adam"),
        needs=("prepare",),
        makes=("runs/short-16-zero_one_adam",),
    ),
    Step(
        name="train-8-zero_one",
        run=training.short_run(8, "zero_one_adam"),
        needs=("prepare",),
        makes=("runs/short-8-zero_one_adam",),
    ),
    Step(
        name="train-4-zero_one",
        run=training.short_run(4, "zero_one_adam"),
        needs=("prepare",),
        makes=("runs/short-4-zero_one_adam",),
    ),
    Step(name="doctor", run=training.doctor, needs=("prepare",)),
    Step(name="plan", run=training.plan, needs_ray=False, needs=("prepare",)),
    Step(name="job", run=searching.submit_job, needs=("prepare",)),
    Step(name="pretrain", run=preparing.pretrain, needs_ray=False, makes=("pretrained",)),
    Step(name="prefetch", run=preparing.prefetch, needs_ray=False, makes=("mirror",)),
    Step(
        name="report",
        run=searching.report,
        needs_ray=False,
        needs=("evaluate", "evaluate-base"),
        makes=(
            "report",
            "to-report",
        ),
    ),
)
