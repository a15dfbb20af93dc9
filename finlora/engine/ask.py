"""One question to one model, in this process or spread over stage actors: what `finlora ask` does."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finlora.config import RunConfig
from finlora.data.encode import encode_answer, encode_prompt, end_token_id
from finlora.data.question import Question
from finlora.engine.core import EngineCore, Executor, InProcess
from finlora.engine.extents import BLOCK
from finlora.engine.grounding import find_quote
from finlora.engine.request import Finish, Request, Sampling
from finlora.engine.scheduler import Limits, Scheduler
from finlora.model.contract import read_contract
from finlora.model.source import find_source, fingerprint_weights
from finlora.model.tokenizer import hash_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ADAPTER = "adapter"


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
    """
    source = find_source(config.model)
    tokenizer = load_tokenizer(source.tokenizer_path)
    if adapter is not None:
        contract = read_contract(adapter)
        hashes = fingerprint_weights(source), hash_tokenizer(tokenizer)
        contract.check_hashes(adapter, *hashes, config.model.template)
    request = make_request(question, tokenizer, config, sampling, ADAPTER if adapter else None)
    with open_executor(config, num_stages, request.num_tokens) as executor:
        limits = Limits(cache_rows=_round_up(request.num_tokens), max_in_flight=num_stages)
        end = end_token_id(tokenizer, config.model.template)
        core = EngineCore(executor, Scheduler(limits, end, lambda: random.getrandbits(31)), tokenizer)
        if adapter is not None:
            core.load_adapter(ADAPTER, adapter)
        core.submit(request)
        pieces: list[str] = []

        def take(_request_id: str, piece: str) -> None:
            pieces.append(piece)
            on_text(piece)

        answers = []
        while not core.is_idle:
            answers += core.step(take)
    (answer,) = answers
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
    highest = max(log_probs)
    weights = [math.exp(value - highest) for value in log_probs]
    pairs = sorted(zip(choices, weights, strict=True), key=lambda pair: -pair[1])
    return {choice: weight / sum(weights) for choice, weight in pairs}


@contextmanager
def open_executor(config: RunConfig, num_stages: int, cache_rows: int) -> Iterator[Executor]:
    """Hold the base of a config in one stage of this process, or in several actors, while inside."""
    import torch

    from finlora.engine.stage import Stage
    from finlora.model.base import load_base, quiet_bitsandbytes

    bits = config.eval.bits or config.model.bits
    if num_stages > 1:
        from finlora.engine.pipeline import Pipeline, PipelineConfig

        settings = PipelineConfig(
            num_stages=num_stages,
            cache_rows=_round_up(cache_rows),
            device=config.eval.device,
            gpus_per_stage=config.eval.num_gpus,
            cpus_per_stage=1.0 / num_stages,  # one core in all, as an evaluation reserves
            wait_s=config.max_wait_s,
        )
        pipeline = Pipeline(config.model, bits, settings, config.seed)
        try:
            yield pipeline
        finally:
            pipeline.close()
        return
    device = torch.device("cuda:0" if config.eval.device == "cuda" else "cpu")
    with quiet_bitsandbytes():
        net = load_base(config.model, bits, device, config.seed).model
        dtype = torch.bfloat16 if config.model.compute_dtype == "bfloat16" else torch.float32
        span = range(net.config.num_hidden_layers)
        yield InProcess([Stage(net, span, _round_up(cache_rows), dtype)])


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK) * BLOCK
