"""Ledger of answers: counts each one against its key's quota, in the metrics and in the audit log."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from finlora.engine.request import Answer
from finlora.serve.accounts.audit import AuditEntry, AuditLog, hash_text
from finlora.serve.accounts.keys import KeyRecord
from finlora.serve.accounts.label_monitor import LabelMeter
from finlora.serve.accounts.quota import KeptQuota, Standings
from finlora.serve.adapter_versions import ServedAdapter
from finlora.serve.stage_states import Snapshot


class Meter(LabelMeter, Protocol):
    """Receiver of a server's metrics."""

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
    """Admitted request of a client."""

    request_id: str
    key: KeyRecord
    path: str
    model: str
    """Model name of the request."""
    adapter: ServedAdapter | None
    """None: the base alone."""
    standings: Standings = field(default_factory=dict)
    """What the key may still use."""
    engine_id: str = field(default_factory=lambda: secrets.token_hex(12))
    """Id in the engine. It is unique, while two clients may send the same request id."""


@dataclass(slots=True)
class AnswerRecord:
    """Progress and outcome of one answer.

    `prompt` is the client's text; `choices` are the allowed answers, empty for generated text; `index` is the prompt's
    number in its request.
    """

    call: Call
    prompt: str
    num_prompt: int
    choices: Sequence[str] = ()
    index: int = 0

    started: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    pieces: list[str] = field(default_factory=list)
    answer: Answer | None = None
    outcome: str = "cancelled"

    @property
    def each_s(self) -> float | None:
        """Mean seconds between two tokens; None for fewer than two tokens."""
        count = len(self.answer.tokens) if self.answer else 0
        if self.first_s is None or count < 2:
            return None
        return (time.monotonic() - self.started - self.first_s) / (count - 1)


class Ledger:
    """Record of all answers.

    Args:
        base_hash: fingerprint of the base's weights.
        audit: None: no audit log.
        has_texts: whether the audit log contains prompts and answers besides their hashes.
    """

    def __init__(
        self, quota: KeptQuota, meter: Meter, base_hash: str, audit: AuditLog | None, *, has_texts: bool
    ) -> None:
        self.quota, self.meter, self.audit = quota, meter, audit
        self._base_hash, self._has_texts = base_hash, has_texts

    def close(self, record: AnswerRecord) -> None:
        """Record the outcome of a request, with or without an answer.

        Raises:
            OSError: the audit log cannot be written.
        """
        call, answer = record.call, record.answer
        num_new = len(answer.tokens) if answer else 0
        self.quota.take_tokens(call.key, record.num_prompt + num_new)
        self.meter.count_answer(
            call.adapter.name if call.adapter else "base",
            record.outcome,
            record.num_prompt,
            answer.num_cached if answer else 0,
            num_new,
            record.first_s if answer else None,
            record.each_s,
        )
        if self.audit is None:
            return
        output = "".join(record.pieces)
        if record.choices and answer and answer.log_probs:
            output = max(zip(answer.log_probs, record.choices, strict=True))[1]
        texts = {"prompt": record.prompt, "output": output} if self._has_texts else {}
        self.audit.append(
            AuditEntry(
                request_id=call.request_id,
                index=record.index,
                key_id=call.key.id,
                path=call.path,
                model=call.model,
                base_hash=self._base_hash,
                adapter_hash=call.adapter.hash if call.adapter else None,
                prompt_hash=hash_text(record.prompt),
                output_hash=hash_text(output) if answer else None,
                outcome=record.outcome,
                prompt_tokens=record.num_prompt,
                completion_tokens=num_new,
                seconds=round(time.monotonic() - record.started, 4),
                **texts,
            )
        )
