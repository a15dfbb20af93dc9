"""What came of each question: counted for its key, in the metrics, and in the audit log."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from finlora.engine.request import Answer
from finlora.serve.accounts.audit import AuditEntry, AuditLog, hash_text
from finlora.serve.accounts.keys import KeyRecord
from finlora.serve.accounts.quota import KeptQuota
from finlora.serve.adapter_versions import ServedAdapter
from finlora.serve.stage_states import Snapshot


class Meter(Protocol):
    """Where numbers go."""

    def count_request(self, path: str, status: int, seconds: float) -> None: ...

    def count_answer(
        self,
        adapter: str,
        outcome: str,
        prompt_tokens: int,
        cached_tokens: int,
        new_tokens: int,
        first_s: float | None,
        each_s: float | None,
    ) -> None: ...

    def show(self, snapshot: Snapshot, *, is_ready: bool) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """A request of a client that was let in."""

    request_id: str
    key: KeyRecord
    path: str
    model: str
    """As it was asked for."""
    adapter: ServedAdapter | None
    """None: the base alone."""
    engine_id: str = field(default_factory=lambda: secrets.token_hex(12))
    """Its name in the engine: two clients may give their requests one id."""


@dataclass(slots=True)
class Course:
    """How one answer comes along.

    `prompt` is as the client gave it; `choices` are the allowed answers, none for free text.
    """

    call: Call
    prompt: str
    num_prompt: int
    choices: Sequence[str] = ()

    started: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    pieces: list[str] = field(default_factory=list)
    answer: Answer | None = None
    outcome: str = "cancelled"

    @property
    def each_s(self) -> float | None:
        """Seconds between two tokens; None where there were fewer."""
        count = len(self.answer.tokens) if self.answer else 0
        if self.first_s is None or count < 2:
            return None
        return (time.monotonic() - self.started - self.first_s) / (count - 1)


class Ledger:
    """Where answers are written down.

    Args:
        base_hash: fingerprint of the base's weights.
        audit: None: there is no audit log.
        has_texts: whether the audit log holds prompts and answers themselves.
    """

    def __init__(
        self, quota: KeptQuota, meter: Meter, base_hash: str, audit: AuditLog | None, *, has_texts: bool
    ) -> None:
        self.quota, self.meter, self.audit = quota, meter, audit
        self._base_hash, self._has_texts = base_hash, has_texts

    def close(self, course: Course) -> None:
        """Write down what came of a question, whether or not an answer did.

        Raises:
            OSError: the audit log cannot be written.
        """
        call, answer = course.call, course.answer
        num_new = len(answer.tokens) if answer else 0
        self.quota.take_tokens(call.key, course.num_prompt + num_new)
        self.meter.count_answer(
            call.adapter.name if call.adapter else "base",
            course.outcome,
            course.num_prompt,
            answer.num_cached if answer else 0,
            num_new,
            course.first_s if answer else None,
            course.each_s,
        )
        if self.audit is None:
            return
        output = "".join(course.pieces)
        if course.choices and answer and answer.log_probs:
            output = max(zip(answer.log_probs, course.choices, strict=True))[1]
        texts = {"prompt": course.prompt, "output": output} if self._has_texts else {}
        self.audit.append(
            AuditEntry(
                request_id=call.request_id,
                key_id=call.key.id,
                path=call.path,
                model=call.model,
                base_hash=self._base_hash,
                adapter_hash=call.adapter.hash if call.adapter else None,
                prompt_hash=hash_text(course.prompt),
                output_hash=hash_text(output) if answer else None,
                outcome=course.outcome,
                prompt_tokens=course.num_prompt,
                completion_tokens=num_new,
                seconds=round(time.monotonic() - course.started, 4),
                **texts,
            )
        )
