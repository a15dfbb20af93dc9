"""One question to one model, in this process or in stage actors (`finlora ask`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.config import RunConfig
from finlora.data.encode import encode_asked, encode_choices
from finlora.data.grounding import find_quote
from finlora.data.question import Form, Question
from finlora.data.sets.catalog import FORMS
from finlora.data.sets.prepared import read_prepared
from finlora.data.taskfile.asking import make_form
from finlora.data.taskfile.load import read_card
from finlora.engine.request import ADAPTER, Finish, Piece, Request, Sampling, normalise_choices
from finlora.errors import ConfigError
from finlora.machine.lean_imports import lean_imports
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.model.contract import read_contract, read_tasks, require_same_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """Answer in the form that `finlora ask` shows."""

    probabilities: dict[str, float]
    """Choice -> probability, normalised over all choices, likeliest first; empty for free text."""
    text: str
    """The likeliest choice, or the generated text."""
    quote: tuple[int, int] | None
    """First character of the generated text in the question's context, and the one behind it; None: not found there."""
    finish: Finish
    num_prompt_tokens: int
    template_date: str | None
    """Date that the chat template wrote into the prompt; None: it writes none, or a fixed one."""
    unknown: str
    """What is unknown of an adopted adapter; empty: nothing."""


def ask(
    config: RunConfig,
    adapter: Path | None,
    question: Question,
    sampling: Sampling,
    num_stages: int,
    on_text: Callable[[str], None],
    base: BaseFiles | None = None,
) -> Reply:
    """Load the model, answer one question, and free the model.

    Args:
        config: with absolute paths; eval.bits and eval.device apply to the base.
        adapter: adapter folder; None: the base model alone.
        num_stages: 1: in this process; more: in that many Ray actors, Ray being connected.
        on_text: called with generated text as it is streamed.
        base: files of the config's base, if this process has found and checked them already. None: it does so here.

    Raises:
        AdapterError: the adapter is incomplete, or was trained for another base, tokenizer or template.
        ConfigError: the prompt is too long for the model.
        ResourceError: the device's memory or the cluster's resources are too small.
        StageLostError: a stage crashed before the answer was complete.
    """
    base = base or read_base_files(config.model)
    tokenizer = base.tokenizer
    contract = read_contract(adapter) if adapter else None
    date = base.check_adapter(adapter, contract) if adapter and contract else base.template_date
    request = make_request(question, tokenizer, config, sampling, ADAPTER if adapter else None, date)
    longest = min(config.model.max_seq_len, base.context_length)
    if request.num_tokens > longest:
        raise ConfigError(
            f"the question takes {request.num_tokens:,} tokens with the room for its answer, and the model {longest:,}: shorten "
            "the text, or raise model.max_seq_len as far as the base goes."
        )
    # Slow to import, and not needed if the question is refused.
    with lean_imports():
        from finlora.inference.open_base import open_engine

    rows = request.num_tokens
    with open_engine(config, base, adapter, num_stages, rows, rows) as (core, _):
        core.submit(request)
        pieces: list[str] = []

        def take(_request_id: str, piece: Piece) -> None:
            pieces.append(piece.text)
            on_text(piece.text)

        answers = []
        while not core.is_idle:
            answers += core.step(take)
    (answer,) = answers
    answer.require_numbers()
    ranked = rank_choices(question.choices, answer.log_probs) if question.choices else {}
    text = next(iter(ranked), "") or "".join(pieces)
    return Reply(
        probabilities=ranked,
        text=text,
        quote=None if ranked else find_quote(text, question.context),
        finish=answer.finish,
        num_prompt_tokens=len(request.prompt_ids),
        template_date=date,
        unknown=contract.describe_unknown() if contract else "",
    )


def list_own_forms(task: str | None, adapter: Path | None, data: Path, base: BaseFiles) -> dict[str, Form]:
    """Return the forms of tasks of task files, where the task asked for is not built in: those that the adapter or a merged base
    brings, and the prepared task of that name.

    Args:
        data: folder of prepared tasks.

    Raises:
        AdapterError: the tasks that it brings cannot be read.
        DatasetError: the prepared task is damaged, or asks something else than the adapter was trained on.
    """
    if task is None or task in FORMS:
        return {}
    contract = read_contract(adapter) if adapter is not None else None
    brought = base.tasks if adapter is None or contract is None else read_tasks(adapter, contract)
    forms = {name: own.form for name, own in brought.items() if own.form is not None}
    if task not in forms and (data / task).is_dir():
        split = read_prepared(data, task, "test")
        if adapter is not None and contract is not None:
            require_same_task(adapter, contract, task, split.card_hash)
        if split.card is not None:
            forms[task] = make_form(read_card(split.card))
    return forms


def make_request(
    question: Question,
    tokenizer: PreTrainedTokenizerFast,
    config: RunConfig,
    sampling: Sampling,
    adapter: str | None,
    date: str | None,
) -> Request:
    """Encode a question as in training.

    Args:
        date: as in `encode_prompt`.
    """
    template = config.model.template
    return Request(
        id="ask",
        prompt_ids=encode_asked(question, tokenizer, template, date),
        adapter=adapter,
        sampling=sampling,
        choices=encode_choices(question.choices, tokenizer, template),
    )


def rank_choices(choices: Sequence[str], log_probs: Sequence[float]) -> dict[str, float]:
    """Return each choice's probability, normalised over all choices, likeliest first."""
    pairs = sorted(zip(choices, normalise_choices(log_probs), strict=True), key=lambda pair: -pair[1])
    return dict(pairs)
