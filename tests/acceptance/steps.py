"""All steps of the acceptance walk, in the order of the table; those needed come before those that need them."""

from __future__ import annotations

from acceptance import answering, preparing, searching, serving, training
from acceptance.schedule import Step

STEPS: tuple[Step, ...] = (
    Step(name="prepare", run=preparing.prepare),
    Step(name="train-main", run=training.train_main, needs=("prepare",)),
    Step(name="train-16-adamw", run=training.short_run(16, "adamw"), needs=("prepare",)),
    Step(name="stop-resume", run=training.stop_and_resume, needs=("prepare",)),
    Step(name="evaluate-base", run=answering.evaluate_base, needs=("prepare",)),
    Step(name="xbrl", run=answering.xbrl, needs=("prepare",)),
    Step(name="evaluate", run=answering.evaluate_adapter, needs=("train-main", "evaluate-base")),
    Step(name="serve", run=serving.serve, needs=("train-main", "train-16-adamw")),
    Step(name="merge", run=answering.merge, needs=("train-16-adamw",)),
    Step(name="ask", run=answering.ask, needs=("train-main",)),
    Step(name="text", run=answering.evaluate_text, needs=("train-main", "evaluate-base")),
    Step(name="tune", run=searching.tune, needs=("prepare",)),
    Step(name="reproduce", run=searching.reproduce, needs=("prepare",)),
    Step(name="train-8-adamw", run=training.short_run(8, "adamw"), needs=("prepare",)),
    Step(name="train-4-adamw", run=training.short_run(4, "adamw"), needs=("prepare",)),
    Step(name="train-16-zero_one", run=training.short_run(16, "zero_one_adam"), needs=("prepare",)),
    Step(name="train-8-zero_one", run=training.short_run(8, "zero_one_adam"), needs=("prepare",)),
    Step(name="train-4-zero_one", run=training.short_run(4, "zero_one_adam"), needs=("prepare",)),
    Step(name="plan", run=training.plan, needs=("prepare",)),
    Step(name="job", run=searching.submit_job, needs=("prepare",)),
    Step(name="pretrain", run=preparing.pretrain),
    Step(name="prefetch", run=preparing.prefetch),
    Step(name="report", run=searching.report, needs=("evaluate", "evaluate-base")),
)
