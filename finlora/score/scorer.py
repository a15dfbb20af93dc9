"""Engine that scores parts: reads a part's rows, runs its prompts as one batch, seals the results.

Each part begins with an empty prefix cache, so its results depend on its rows alone: every engine writes the same bytes, also
after a crash.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from finlora.data.encode import encode_choices, encode_prompt
from finlora.data.grounding import find_quote
from finlora.engine.request import ADAPTER
from finlora.errors import DatasetError
from finlora.inference.batch import BatchEngine
from finlora.inference.open_base import count_rows, open_engine
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.score.folder import ScoreFolder
from finlora.score.score_plan import ScorePlan
from finlora.score.table import Part, Row, RowGroups, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_DIGITS = 6
"""Decimals of a probability: more than bfloat16 or int8 weights give."""


class Asked(NamedTuple):
    """Encoded prompt of a row."""

    context: str
    prompt_ids: tuple[int, ...]
    reason: str | None
    """Why it cannot be scored; None: it can."""


class Scorer:
    """A loaded model that scores the parts of a plan, one after the other.

    Args:
        cache_rows: rows of the KV cache, from `plan_cache`.
    """

    def __init__(self, plan: ScorePlan, out: Path, cache_rows: int, base: BaseFiles | None = None) -> None:
        base = base or read_base_files(plan.config.model)
        self._plan, self._folder = plan, ScoreFolder(out)
        self._tokenizer, self._longest = base.tokenizer, find_longest(plan, base)
        self._choices = encode_choices(plan.form.choices, base.tokenizer, plan.config.model.template)
        self._groups, self._stack = RowGroups(), ExitStack()
        opened = self._stack.enter_context(
            open_engine(plan.config, base, plan.adapter, plan.config.eval.num_stages, cache_rows, self._longest)
        )
        self._engine = BatchEngine(opened.core, ADAPTER if plan.adapter else None, opened.renew)

    def score(self, part: Part) -> None:
        """Score a part and seal its results, unless it is sealed already."""
        if not self._folder.is_sealed(part.number):
            self._folder.write_part(part.number, self._plan.columns, self._answer(self._ask(part)))

    def close(self) -> None:
        """Free the model and its stages."""
        self._stack.close()

    def _ask(self, part: Part) -> list[Asked]:
        plan = self._plan
        rows = read_rows(plan.table, part, self._groups, plan.read_columns)
        return [ask_row(plan, row, self._tokenizer, self._longest, self._choices) for row in rows]

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


def ask_row(
    plan: ScorePlan, row: Row, tokenizer: PreTrainedTokenizerFast, longest: int, choices: Sequence[Sequence[int]]
) -> Asked:
    """Encode the prompt of a row, or give the reason why it cannot be scored.

    Args:
        longest: most tokens of a request, its answer included.
        choices: tokens of the allowed answers.
    """
    text, about = (_as_text(row.get(column)) if column else None for column in (plan.text, plan.about))
    if text is None or not text.strip():
        return Asked("", (), f"no text in {plan.text}")
    if plan.about and (about is None or not about.strip()):
        return Asked("", (), f"nothing in {plan.about}")
    try:
        question = plan.form.ask(plan.task or "a plain prompt", text, about or "")
    except DatasetError as error:
        return Asked("", (), str(error))
    ids = encode_prompt(question.prompt, tokenizer, plan.config.model.template, plan.date)
    room = _count_answer_tokens(plan, choices)
    if len(ids) + room > longest:
        return Asked("", (), f"too long: {len(ids):,} tokens and {room:,} for the answer, the model takes {longest:,}")
    return Asked(question.context, ids, None)


def plan_cache(plan: ScorePlan, base: BaseFiles) -> int:
    """Return the KV cache's rows: for the eval.batch_size longest requests of the first part, or for one request of
    `find_longest` tokens if that needs more."""
    choices = encode_choices(plan.form.choices, base.tokenizer, plan.config.model.template)
    longest = find_longest(plan, base)
    rows = read_rows(plan.table, plan.table.parts[0], RowGroups(), plan.read_columns)
    asked = [ask_row(plan, row, base.tokenizer, longest, choices) for row in rows]
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
