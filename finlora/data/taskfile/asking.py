"""Prompts of a task file: how each kind asks, the same in training, evaluation and serving."""

from __future__ import annotations

from collections.abc import Sequence

from finlora.data.prompts import choose, completion
from finlora.data.question import Form
from finlora.data.taskfile.record import YES_NO, TaskFile

_MULTI_INSTRUCTION = "Does this text belong to: {label}?"


def make_form(task: TaskFile) -> Form:
    """Return the task's form: prompt, allowed answers, and what a request names beside the text."""
    asks_question = task.columns.question is not None
    values: tuple[str, ...] = ()
    if task.kind == "multi":
        asks_question, values = True, tuple(label.value for label in task.labels)

    def render(text: str, about: str) -> str:
        return render_prompt(task, text, about)

    return Form(
        render=render,
        choices=task.choices,
        about="question" if asks_question else "none",
        about_values=values,
        is_quoted=task.kind == "number",
        system=task.prompt.system if task.is_chat else None,
    )


def render_prompt(task: TaskFile, text: str, about: str) -> str:
    """Return the prompt of one question.

    Args:
        about: the row's question; for kind multi the label asked about; empty if the task needs only the text.
    """
    if task.is_chat:
        return text
    system = f"{task.prompt.system}\n\n" if task.prompt.system else ""
    instruction = _instruct(task, about)
    if instruction is None:
        shot = "" if task.prompt.example is None else f"{task.prompt.example.text}{task.prompt.example.label}\n\n"
        return f"{system}{shot}{text}"
    shot = ""
    if task.prompt.example is not None:
        example = task.prompt.example
        asked = _instruct(task, example.question) if example.question else instruction
        shot = completion(asked or "", example.text) + f"{example.label}\n\n"
    return f"{system}{shot}{completion(instruction, text)}"


def _instruct(task: TaskFile, about: str | None) -> str | None:
    """Return the instruction with the allowed answers; None: the text is the whole prompt."""
    if task.kind == "multi":
        form = task.prompt.instruction or _MULTI_INSTRUCTION
        means = next((label.means for label in task.labels if label.value == about), None)
        label = f"{about} ({means})" if means else about or ""
        question = form.replace("{label}", label) if "{label}" in form else f"{form} {label}"
        return f"{question} {choose(YES_NO)}"
    question = about or task.prompt.instruction or ""
    if task.kind == "number":
        unit = f", in {task.number.unit}" if task.number.unit else ""
        decimals = task.number.decimals
        rounding = "" if decimals is None else f", rounded to {decimals} decimal{'' if decimals == 1 else 's'}"
        return f"{question} Give only the number{unit}{rounding}."
    if task.kind == "text":
        return task.prompt.instruction
    meanings = "".join(f"\n{label.value}: {label.means}" for label in task.labels if label.means)
    return f"{question} {_choose(task.choices)}{meanings}"


def _choose(choices: Sequence[str]) -> str:
    """List the allowed answers as the built-in tasks do; if one of them has a slash, in quotes."""
    if any("/" in choice for choice in choices):
        return "Please choose an answer from: " + ", ".join(f'"{choice}"' for choice in choices) + "."
    return choose(choices)
