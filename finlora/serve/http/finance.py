"""Financial endpoints: labels with their probabilities, and answers quoted from a text such as an XBRL excerpt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field

from finlora.data.grounding import find_quote
from finlora.data.question import About, Form, Question
from finlora.data.sets.catalog import FORMS, make_question
from finlora.engine.request import Answer, normalise_choices
from finlora.serve.accounts.ledger import Call
from finlora.serve.failures import RefusedError
from finlora.serve.http.completions import count_usage
from finlora.serve.http.context import ANSWERING_ERRORS, LOOKING_ERRORS, gather_all, key_of, open_call, server_of
from finlora.serve.http.server import Server
from finlora.serve.protocol import (
    ClassifyRequest,
    ClassifyResponse,
    ExtractRequest,
    ExtractResponse,
    LabelResult,
    Quote,
)

router = APIRouter(tags=["Financial questions"])


class TaskFacts(BaseModel):
    name: str = Field(description="Name to give as `task`.")
    about: About = Field(description="What the task asks about the text; the request names it as `about`.")
    labels: list[str] = Field(description="Allowed answers; empty for a task with free answers.")
    questions: list[str] = Field(description="Allowed values of `about`; empty: any text.")
    title: str = Field(default="", description="What the task is; empty for a built-in one.")
    models: list[str] = Field(
        default=[], description="Models that bring the task with them; empty: any model takes it."
    )
    quoted: bool = Field(default=False, description="Whether a free answer should occur in the text.")


class TaskList(BaseModel):
    object: Literal["list"] = "list"
    data: list[TaskFacts] = Field(description="The tasks.")


@router.get("/v1/tasks", summary="List the tasks", responses=LOOKING_ERRORS)
async def list_tasks(request: Request) -> TaskList:
    """List the questions that can be asked. Any model takes a built-in one; an adapter that was trained on a task file brings its
    task along, also into a model that it is merged into."""
    built_in = [_describe(name, form) for name, form in FORMS.items()]
    brought = server_of(request).list_own_tasks(key_of(request))
    own = [
        _describe(task.name, task.form).model_copy(update={"title": task.title, "models": models})
        for task, models in brought
        if task.form is not None
    ]
    return TaskList(data=[*built_in, *own])


@router.post("/v1/classify", summary="Label texts", responses=ANSWERING_ERRORS)
async def classify(body: ClassifyRequest, request: Request) -> ClassifyResponse:
    """Return the probability of each label of the task, for each text. Each text costs one forward pass."""
    server = server_of(request)
    call = await open_call(request, body.model)
    most = server.config.limits.max_texts
    if len(body.all_texts) > most:
        raise RefusedError(
            400,
            f"found {len(body.all_texts):,} texts: expected at most {most:,} in one request.",
            "invalid_value",
            "texts",
        )
    forms = _forms_of(server, call, body.task)
    questions = [_ask(forms, body.task, *pair) for pair in zip(body.all_texts, body.all_abouts, strict=True)]
    answers = await gather_all([server.choose(call, question, index) for index, question in enumerate(questions)])
    results = [
        _label(question, answer, body.threshold) for question, (_, answer) in zip(questions, answers, strict=True)
    ]
    for question, result in zip(questions, results, strict=True):
        server.labels.count(call.adapter, body.task, question.choices, result.probabilities, body.threshold)
    return ClassifyResponse(
        id=call.request_id,
        model=body.model,
        task=body.task,
        results=results,
        usage=count_usage(sum(size for size, _ in answers), [answer for _, answer in answers]),
    )


@router.post("/v1/extract", summary="Find a tag or a number", responses=ANSWERING_ERRORS)
async def extract(body: ExtractRequest, request: Request) -> ExtractResponse:
    """Answer a question from a text and say where in it the answer is. Check an answer yourself where `grounded` is false."""
    server = server_of(request)
    call = await open_call(request, body.model)
    forms = _forms_of(server, call, body.task)
    free = [name for name, form in forms.items() if not form.choices]
    if body.task not in free:
        raise RefusedError(
            400,
            f"task {body.task!r} quotes no answer from a text: expected one of {', '.join(free)}.",
            "invalid_value",
            "task",
        )
    if not body.question.strip() and forms[body.task].about != "none":
        raise RefusedError(400, "question is empty: say what to look for in the context.", "invalid_value", "question")
    question = make_question(body.task, body.context, body.question, forms)
    ids = server.encode(call, question)
    default = server.config.limits.default_extract_tokens
    sampling = server.make_sampling(ids, max_tokens=body.max_tokens, default_tokens=default)
    pieces: list[str] = []
    async for event in server.generate(call, question.prompt, ids, sampling):
        if isinstance(event, Answer):
            break
        pieces.append(event.text)
    text = "".join(pieces).strip()
    quote = find_quote(text, body.context) if forms[body.task].is_quoted else None
    return ExtractResponse(
        id=call.request_id,
        model=body.model,
        task=body.task,
        answer=text,
        quote=Quote(start=quote[0], end=quote[1]) if quote else None,
        grounded=quote is not None,
        finish_reason="length" if isinstance(event, Answer) and event.finish == "length" else "stop",
        usage=count_usage(len(ids), [event] if isinstance(event, Answer) else []),
    )


def _describe(name: str, form: Form) -> TaskFacts:
    return TaskFacts(
        name=name,
        about=form.about,
        labels=list(form.choices),
        questions=list(form.about_values),
        quoted=not form.choices and form.is_quoted,
    )


def _forms_of(server: Server, call: Call, task: str) -> dict[str, Form]:
    """Return the tasks that a call's model can be asked: the built-in ones and those that its adapter or the merged base brings.

    Raises:
        RefusedError: another model brings the task.
    """
    forms = {**FORMS, **(call.adapter.forms if call.adapter else server.base.forms)}
    if task not in forms:
        models = [name for own, models in server.list_own_tasks(call.key) if own.name == task for name in models]
        if models:
            raise RefusedError(
                400,
                f"task {task!r} comes with the model {' or '.join(models)}, and {call.model} was asked: ask that model.",
                "invalid_value",
                "task",
            )
    return forms


def _ask(forms: Mapping[str, Form], task: str, text: str, about: str | None) -> Question:
    """Render a question of a task with labels.

    Raises:
        RefusedError: the task is unknown, or `about` is missing or not allowed.
        DatasetError: the text is empty, or `about` does not fit it.
    """
    labelled = [name for name, form in forms.items() if form.choices]
    if task not in labelled:
        raise RefusedError(
            400, f"task {task!r} has no labels here: expected one of {', '.join(labelled)}.", "invalid_value", "task"
        )
    wanted = forms[task].about
    if (wanted == "none") != (about is None or not about):
        values = f", one of {', '.join(forms[task].about_values)}" if forms[task].about_values else ""
        found, do = ("no about", f"name the {wanted}{values}") if not about else (f"about={about!r}", "leave it out")
        raise RefusedError(400, f"found {found} for task {task}: {do}.", "invalid_value", "about")
    return make_question(task, text, about, forms)


def _label(question: Question, answer: Answer, threshold: float) -> LabelResult:
    pairs = zip(question.choices, normalise_choices(answer.log_probs), strict=True)
    ranked = dict(sorted(pairs, key=lambda pair: -pair[1]))
    label, probability = next(iter(ranked.items()))
    abstains = probability < threshold
    return LabelResult(label=None if abstains else label, probabilities=ranked, abstained=abstains)
