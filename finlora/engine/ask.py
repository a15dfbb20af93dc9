"""One question to one model, in this process or spread over stage actors: what `finlora ask` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.config import RunConfig
from finlora.data.encode import encode_answer, encode_prompt
from finlora.data.question import Question
from finlora.engine.grounding import find_quote
from finlora.engine.request import ADAPTER, Finish, Piece, Request, Sampling, normalise_choices
from finlora.model.contract import read_contract
from finlora.model.source import find_source, fingerprint_weights
from finlora.model.tokenizer import hash_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """An answer as a user reads it."""

    probabilities: dict[str, float]
    """Allowed answer -> probability, normalised over them, likeliest first; empty for free text."""
    text: str
    """The likeliest allowed answer, or the generated text."""
    quote: tuple[int, int] | None
    """Where generated text stands in the question's context, from and to which character; None: nowhere."""
    finish: Finish
    num_prompt_tokens: int


def ask(
    config: RunConfig,
    adapter: Path | None,
    question: Question,
    sampling: Sampling,
    num_stages: int,
    on_text: Callable[[str], None],
) -> Reply:
    """Load the model, answer one question, and let the model go.

    Args:
        config: with absolute paths; eval.bits and eval.device say how the base is held.
        adapter: adapter folder; None: the base alone.
        num_stages: 1: this process holds the model; more: so many Ray actors, Ray being connected.
        on_text: gets generated text as it comes.

    Raises:
        AdapterError: the adapter is incomplete or was made for another base, tokenizer or template.
        ConfigError: the prompt is too long for the model.
        ResourceError: the device or the cluster has too little.
        StageLostError: a stage died before the answer was complete.
    """
    source = find_source(config.model)
    tokenizer = load_tokenizer(source.tokenizer_path)
    if adapter is not None:
        contract = read_contract(adapter)
        hashes = fingerprint_weights(source), hash_tokenizer(tokenizer)
        contract.check_hashes(adapter, *hashes, config.model.template)
    request = make_request(question, tokenizer, config, sampling, ADAPTER if adapter else None)
    # Slow to import, and not needed where the question cannot be asked.
    from finlora.engine.opening import open_engine

    rows = request.num_tokens
    with open_engine(config, tokenizer, adapter, num_stages, rows, rows) as (core, _):
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
    )


def make_request(
    question: Question,
    tokenizer: PreTrainedTokenizerFast,
    config: RunConfig,
    sampling: Sampling,
    adapter: str | None,
) -> Request:
    """Encode a question as training does."""
    template = config.model.template
    return Request(
        id="ask",
        prompt_ids=encode_prompt(question.prompt, tokenizer, template),
        adapter=adapter,
        sampling=sampling,
        choices=tuple(encode_answer(choice, tokenizer, template) for choice in question.choices),
    )


def rank_choices(choices: Sequence[str], log_probs: Sequence[float]) -> dict[str, float]:
    """Return each choice's probability, normalised over all of them, the likeliest first."""
    pairs = sorted(zip(choices, normalise_choices(log_probs), strict=True), key=lambda pair: -pair[1])
    return dict(pairs)
