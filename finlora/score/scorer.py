"""Engine that scores parts: reads a part's rows, runs its prompts as one batch, seals the results.

Each part has the engine for itself and begins with an empty prefix cache, so its results depend on its rows alone: every engine
writes the same bytes, also after a crash. Meanwhile other threads encode the next part and seal the last one.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finlora.data.encode import encode_choices, encode_prompts
from finlora.data.grounding import find_quote
from finlora.data.question import Question
from finlora.engine.request import ADAPTER
from finlora.errors import DatasetError
from finlora.inference.batch import BatchEngine
from finlora.inference.open_base import count_rows, open_engine
from finlora.machine.heap import return_free_memory
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.score.folder import ScoreFolder
from finlora.score.score_plan import ScorePlan
from finlora.score.table import Part, Row, RowGroups, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_TRIM_EVERY = 8
"""Parts after which free memory is returned: it takes 7 ms and new page faults, 1 % of a part's time on CPU."""
_DIGITS = 6
"""Decimals of a probability: more than bfloat16 or int8 weights give."""


class Asked(NamedTuple):
    """Encoded prompt of a row."""

    context: str
    prompt_ids: tuple[int, ...]
    reason: str | None
    """Why it cannot be scored; None: it can."""


class Scorer:
    """A loaded model that scores the parts of a plan. Several threads may call `score`: the model computes one part at a time.

    Args:
        cache_rows: rows of the KV cache, from `plan_cache`.
    """

    def __init__(self, plan: ScorePlan, out: Path, cache_rows: int, base: BaseFiles | None = None) -> None:
        base = base or read_base_files(plan.config.model)
        self._plan, self._folder = plan, ScoreFolder(out)
        self._tokenizer, self._longest = base.tokenizer, find_longest(plan, base)
        self._choices = encode_choices(plan.form.choices, base.tokenizer, plan.config.model.template)
        self._groups, self._reading, self._stack = RowGroups(), threading.Lock(), ExitStack()
        self._num_sealed = itertools.count(1)
        # One thread computes all parts: oneDNN keeps its compiled kernels per thread.
        self._computing = ThreadPoolExecutor(1, "finlora-engine")
        self._engine = self._computing.submit(self._open, base, cache_rows).result()

    def score(self, part: Part) -> None:
        """Score a part and seal its results, unless it is sealed already."""
        if self._folder.is_sealed(part.number):
            return
        with self._reading:
            asked = self._ask(part)
        results = self._computing.submit(self._answer, asked).result()
        self._folder.write_part(part.number, self._plan.columns, results)
        if next(self._num_sealed) % _TRIM_EVERY == 0:
            return_free_memory()

    def close(self) -> None:
        """Free the model and its stages."""
        self._computing.submit(self._stack.close).result()
        self._computing.shutdown()

    def _open(self, base: BaseFiles, cache_rows: int) -> BatchEngine:
        config, adapter = self._plan.config, self._plan.adapter
        opened = self._stack.enter_context(
            open_engine(config, base, adapter, config.eval.num_stages, cache_rows, self._longest)
        )
        return BatchEngine(opened.core, ADAPTER if adapter else None, opened.renew)

    def _ask(self, part: Part) -> list[Asked]:
        rows = read_rows(self._plan.table, part, self._groups, self._plan.read_columns)
        return ask_rows(self._plan, rows, self._tokenizer, self._longest, self._choices)

    def _answer(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = [{"reason": row.reason} for row in asked]
        scorable = [index for index, row in enumerate(asked) if row.reason is None]
        self._engine.core.scheduler.forget_prefixes()
        prompts = [asked[index].prompt_ids for index in scorable]
        choices = self._plan.form.choices
        if choices:
            scores = self._engine.score_choices(prompts, [self._choices] * len(scorable), _ignore)
            for index, shares in zip(scorable, scores, strict=True):
                results[index] |= self._choose(shares)
            return results
        texts = self._engine.generate(prompts, self._plan.config.eval.max_new_tokens, _ignore)
        for index, text in zip(scorable, texts, strict=True):
            quote = find_quote(text, asked[index].context) if self._plan.form.is_quoted else None
            results[index]["answer"] = text
            if quote:
                results[index] |= {"quote_start": quote[0], "quote_end": quote[1]}
        return results

    def _choose(self, shares: Sequence[float]) -> dict[str, Any]:
        choices, threshold = self._plan.form.choices, self._plan.threshold
        best = max(range(len(shares)), key=shares.__getitem__)  # at a tie, the first one
        found: dict[str, Any] = {"label": choices[best], "probability": round(shares[best], _DIGITS)}
        if threshold is not None:
            found["abstained"] = shares[best] < threshold
        return found | {f"p_{choice}": round(share, _DIGITS) for choice, share in zip(choices, shares, strict=True)}


def ask_rows(
    plan: ScorePlan,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerFast,
    longest: int,
    choices: Sequence[Sequence[int]],
) -> list[Asked]:
    """Encode the prompt of each row, or give the reason why it cannot be scored.

    Args:
        longest: most tokens of a request, its answer included.
        choices: tokens of the allowed answers.
    """
    room = _count_answer_tokens(plan, choices)
    questions = [_question_of(plan, row) for row in rows]
    prompts = [question.prompt for question in questions if isinstance(question, Question)]
    encoded = iter(encode_prompts(prompts, tokenizer, plan.config.model.template, plan.date))
    asked = []
    for question in questions:
        if isinstance(question, str):
            asked.append(Asked("", (), question))
        elif len(ids := next(encoded)) + room <= longest:
            asked.append(Asked(question.context, ids, None))
        else:
            reason = f"too long: {len(ids):,} tokens and {room:,} for the answer, the model takes {longest:,}"
            asked.append(Asked("", (), reason))
    return asked


def _question_of(plan: ScorePlan, row: Row) -> Question | str:
    """Return the question about a row, or the reason why there is none."""
    text, about = (_as_text(row.get(column)) if column else None for column in (plan.text, plan.about))
    if text is None or not text.strip():
        return f"no text in {plan.text}"
    if plan.about and (about is None or not about.strip()):
        return f"nothing in {plan.about}"
    try:
        return plan.form.ask(plan.task or "a plain prompt", text, about or "")
    except DatasetError as error:
        return str(error)


def plan_cache(plan: ScorePlan, base: BaseFiles) -> int:
    """Return the KV cache's rows: for the eval.batch_size longest requests of the first part, or for one request of
    `find_longest` tokens if that needs more."""
    choices = encode_choices(plan.form.choices, base.tokenizer, plan.config.model.template)
    longest = find_longest(plan, base)
    rows = read_rows(plan.table, plan.table.parts[0], RowGroups(), plan.read_columns)
    asked = ask_rows(plan, rows, base.tokenizer, longest, choices)
    room = _count_answer_tokens(plan, choices)
    sizes = sorted((len(row.prompt_ids) + room for row in asked if row.reason is None), reverse=True)
    return max(count_rows(sizes, plan.config.eval.batch_size) if sizes else 0, count_rows([longest], 1))


def find_longest(plan: ScorePlan, base: BaseFiles) -> int:
    """Return the most tokens of a request, its answer included."""
    return min(plan.config.model.max_seq_len, base.context_length)


def _count_answer_tokens(plan: ScorePlan, choices: Sequence[Sequence[int]]) -> int:
    return sum(map(len, choices)) if choices else plan.config.eval.max_new_tokens


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else str(value)


def _ignore(_done: int) -> None:
    pass
