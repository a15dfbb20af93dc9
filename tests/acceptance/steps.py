"""All steps of the acceptance walk: each after those that it needs, long chains first."""

from __future__ import annotations

from collections.abc import Callable

from acceptance.schedule import Step
from acceptance.verbs import answering, exchanging, preparing, searching, serving, training
from acceptance.walk import Tools


def _step(
    name: str, run: Callable[[Tools], None], needs: str = "prepare", makes: str = "", *, needs_ray: bool = True
) -> Step:
    return Step(name=name, run=run, needs=tuple(needs.split()), makes=tuple(makes.split()), needs_ray=needs_ray)


def _short(bits: int, optimizer: str) -> Step:
    name = training.run_name(bits, optimizer)
    return _step(name, training.short_run(bits, optimizer), makes=f"runs/{name}")


STEPS: tuple[Step, ...] = (
    _step("prepare", preparing.prepare, needs="", makes="data", needs_ray=False),
    _step("stop-resume", training.stop_and_resume, makes="runs/stopped"),
    _step("train-main", training.train_main, makes="runs/main"),
    _short(16, "adamw"),
    _step("undisturbed", training.undisturbed, makes="runs/undisturbed", needs_ray=False),
    _step("tune", searching.tune, makes="runs/search"),
    _step("filings-base", answering.xbrl_base("filings"), makes="runs/filings-base", needs_ray=False),
    _step("evaluate-base", answering.evaluate_base, makes="runs/base", needs_ray=False),
    _step("serve", serving.serve, needs="train-main", makes="serve"),
    _step("filings", answering.xbrl("filings"), needs="filings-base", makes="runs/filings"),
    _step("xbrl-base", answering.xbrl_base("xbrl"), makes="runs/xbrl-base", needs_ray=False),
    _step("xbrl", answering.xbrl("xbrl"), needs="xbrl-base", makes="runs/xbrl"),
    _step("beside", answering.beside, needs="short-16-adamw", makes="runs/beside", needs_ray=False),
    _step("merge", answering.merge, needs="beside", makes="merged runs/merged", needs_ray=False),
    _step("evaluate", answering.evaluate_adapter, needs="train-main evaluate-base", needs_ray=False),
    _step("staged", answering.evaluate_staged, needs="beside", makes="runs/staged"),
    _step("ask", answering.ask, needs="train-main"),
    _step("score", answering.score, needs="train-main", makes="scored"),
    _step("parity", exchanging.parity, needs="train-main", makes="dequantised", needs_ray=False),
    _step("adopt", exchanging.adopt, needs="train-main", makes="foreign adopted", needs_ray=False),
    _step("ask-text", answering.ask_text),
    _step("reproduce", searching.reproduce, makes="reproduce"),
    _short(8, "adamw"),
    _short(16, "zero_one_adam"),
    _short(8, "zero_one_adam"),
    _short(4, "zero_one_adam"),
    _step("text-base", answering.text_base, makes="runs/base-text", needs_ray=False),
    _step("text", answering.text_adapter, needs="train-main text-base", makes="runs/text", needs_ray=False),
    _step("train-again", training.train_again, needs="train-main"),
    _step("plan", training.plan, needs_ray=False),
    _step("doctor", training.doctor),
    _step("warm", training.warm, makes="kernels", needs_ray=False),
    _step("job", searching.submit_job),
    _step("own-table", preparing.own_table, needs="", makes="own", needs_ray=False),
    _step("prefetch", preparing.prefetch, needs="", makes="mirror", needs_ray=False),
    _step("pretrain", preparing.pretrain, needs="", makes="pretrained", needs_ray=False),
    _step("report", searching.report, needs="evaluate", makes="report to-report", needs_ray=False),
    _step("card", searching.card, needs="evaluate", makes="card", needs_ray=False),
    _step("export", searching.export, needs="evaluate", makes="export", needs_ray=False),
    _step("curves", training.compare_curves, needs="stop-resume undisturbed", needs_ray=False),
)
