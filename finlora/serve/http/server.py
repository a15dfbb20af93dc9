"""Server of one replica: takes a model name, a key and a prompt, and yields an answer that is counted and logged."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

from finlora.data.encode import encode_asked, encode_choices
from finlora.data.question import Question
from finlora.data.task import Task
from finlora.engine.request import Answer, Piece, Request, Sampling
from finlora.errors import AdapterError
from finlora.serve.accounts.audit import AuditLog
from finlora.serve.accounts.keys import KeyRecord, KeyRing
from finlora.serve.accounts.label_monitor import LabelMonitor
from finlora.serve.accounts.ledger import AnswerRecord, Call, Ledger, Meter
from finlora.serve.accounts.quota import KeptQuota, Quota
from finlora.serve.adapter_versions import AdapterShelf
from finlora.serve.failures import RefusedError, as_refusal
from finlora.serve.http.grammar_door import GrammarDoor, too_complex
from finlora.serve.live.handle import AskedEngine
from finlora.serve.served_model import ServedBase
from finlora.serve.settings import ServeConfig
from finlora.serve.stage_states import AdapterRef

_PROBE_S = 15.0


class Server:
    """Server of one replica.

    Args:
        engine: started engine.
        audit: None: no audit log.
        quota: counter of the keys' requests and tokens; None: this server counts them.
    """

    def __init__(
        self,
        config: ServeConfig,
        base: ServedBase,
        engine: AskedEngine,
        keys: KeyRing,
        meter: Meter,
        audit: AuditLog | None,
        quota: KeptQuota | None = None,
    ) -> None:
        self.config, self.base, self.engine, self.keys, self.meter, self.audit = (
            config,
            base,
            engine,
            keys,
            meter,
            audit,
        )
        self.shelf = AdapterShelf.of(config, base)
        self.quota = Quota(time.monotonic) if quota is None else quota
        # Each question of a task has the same few labels.
        self._encode_choices = functools.lru_cache(256)(
            lambda choices: encode_choices(choices, base.tokenizer, base.template)
        )
        self.metrics_address: str | None = None
        """Address of Ray's metrics on this node, which `/metrics` shows; None: there are none."""
        self.labels = LabelMonitor(meter, config.bits)
        self.grammars = GrammarDoor(base)
        self._ledger = Ledger(self.quota, meter, base.weights_hash, audit, has_texts=config.audit_texts)

    def list_own_tasks(self, key: KeyRecord) -> list[tuple[Task, list[str]]]:
        """Return the tasks that adapters or a merged base bring, each with the models that a key may ask it of.

        An adapter that is refused brings none. Tasks of one name that ask different things stand one after the other.
        """
        found: dict[tuple[str, str | None], tuple[Task, list[str]]] = {}

        def add(tasks: Iterable[Task], model: str) -> None:
            for task in tasks:
                found.setdefault((task.name, task.card_hash), (task, []))[1].append(model)

        if key.may_use(None):
            add(self.base.tasks.values(), self.config.name)
        for name in self.shelf.list_names():
            if key.may_use(name):
                with contextlib.suppress(AdapterError):
                    add(self.shelf.find(name).tasks.values(), f"{self.config.name}:{name}")
        return [found[key] for key in sorted(found, key=str)]

    def list_models(self, key: KeyRecord) -> list[str]:
        """Return the names of the models that a key may use."""
        names: list[str | None] = [None, *self.shelf.list_names()]
        return [f"{self.config.name}:{name}" if name else self.config.name for name in names if key.may_use(name)]

    async def open_call(self, request_id: str, key: KeyRecord, path: str, model: str) -> Call:
        """Admit a request: find its model and count it.

        Raises:
            RefusedError: the model does not exist, or the key may not use it.
            AdapterError: the adapter does not fit the base.
            QuotaError: the key has reached its limit.
            StageLostError: a stage is down.
        """
        base, colon, rest = model.partition(":")
        name, _, version = rest.partition("@")
        # A name that the key may not use gets the same error as an unknown one: names can be confidential.
        known = base == self.config.name and (not colon or name in self.shelf.list_names())
        if not known or not key.may_use(name or None):
            there = ", ".join(self.list_models(key)) or "none"
            raise RefusedError(
                404,
                f"there is no model {model!r} for key {key.id!r}: expected one of {there}.",
                "model_not_found",
                "model",
            )
        adapter = self.shelf.find(name, version or None) if name else None
        self.engine.require_ready()  # first: a request that no stage can answer uses nothing
        standings = await self.quota.admit(key)
        return Call(request_id=request_id, key=key, path=path, model=model, adapter=adapter, standings=standings)

    def date_of(self, call: Call) -> str | None:
        """Return the date that the chat template writes into a call's prompts: its adapter's, or the base's."""
        return call.adapter.template_date if call.adapter else self.base.template_date

    def encode(self, call: Call, question: Question) -> tuple[int, ...]:
        """Render a question as in the adapter's training."""
        return encode_asked(question, self.base.tokenizer, self.base.template, self.date_of(call))

    def make_sampling(
        self,
        prompt_ids: Sequence[int],
        *,
        max_tokens: int | None,
        default_tokens: int,
        temperature: float | None = 0.0,
        top_p: float | None = 1.0,
        **more: Any,
    ) -> Sampling:
        """Return the sampling parameters of an answer.

        Args:
            max_tokens: None: `default_tokens`, or fewer if no more fit.
            more: further fields of Sampling.

        Raises:
            RefusedError: the prompt, or prompt and answer, are longer than the model takes.
        """
        limits, room = self.config.limits, self.base.max_tokens - len(prompt_ids)
        wanted = max_tokens if max_tokens is not None else max(1, min(default_tokens, room))
        if wanted > limits.max_new_tokens:
            raise RefusedError(
                400,
                f"found max_tokens={wanted:,}: this server writes at most {limits.max_new_tokens:,} tokens.",
                "invalid_value",
                "max_tokens",
            )
        if wanted > room:
            raise RefusedError(
                400,
                # OpenAI's words, by which clients recognise it.
                f"This model's maximum context length is {self.base.max_tokens} tokens. However, you requested "
                f"{len(prompt_ids) + wanted} tokens ({len(prompt_ids)} in the prompt, {wanted} in the answer): shorten "
                "the prompt or lower max_tokens.",
                "context_length_exceeded",
            )
        return Sampling(
            max_tokens=wanted,
            temperature=0.0 if temperature is None else temperature,
            top_p=1.0 if top_p is None else top_p,
            **more,
        )

    async def generate(
        self, call: Call, prompt: str, prompt_ids: tuple[int, ...], sampling: Sampling, index: int = 0
    ) -> AsyncIterator[Piece | Answer]:
        """Yield the pieces of an answer's text, then the Answer. Leaving early cancels the request.

        Args:
            prompt: text as the client sent it, for the audit log.
            index: index of the prompt in its request.

        Raises:
            RefusedError: the deadline passed.
            FinloraError: as AskedEngine.ask.
        """
        request = Request(
            id=f"{call.engine_id}-{index}",
            prompt_ids=prompt_ids,
            adapter=call.adapter.engine_name if call.adapter else None,
            sampling=sampling,
            client=call.key.id,
            deadline=time.monotonic() + self.config.limits.deadline_s,
        )
        async with contextlib.aclosing(self._follow(call, prompt, request, index=index)) as events:  # type: ignore[type-var]
            async for event in events:
                yield event

    async def choose(self, call: Call, question: Question, index: int = 0) -> tuple[int, Answer]:
        """Return the number of tokens of a question's prompt, and an answer with the log-probabilities of its choices.

        Raises:
            RefusedError: the prompt is too long for the model, or the deadline passed.
            FinloraError: as AskedEngine.ask.
        """
        base = self.base
        request = Request(
            id=f"{call.engine_id}-{index}",
            prompt_ids=self.encode(call, question),
            adapter=call.adapter.engine_name if call.adapter else None,
            choices=self._encode_choices(tuple(question.choices)),
            client=call.key.id,
            deadline=time.monotonic() + self.config.limits.deadline_s,
        )
        if request.num_tokens > base.max_tokens:
            raise RefusedError(
                400,
                f"This model's maximum context length is {base.max_tokens} tokens. However, the text makes a prompt of "
                f"{len(request.prompt_ids)} tokens, with its labels {request.num_tokens}: shorten the text.",
                "context_length_exceeded",
            )
        async for event in self._follow(call, question.prompt, request, question.choices, index):
            if isinstance(event, Answer):
                return len(request.prompt_ids), event
        raise AssertionError("a request ends with its answer or an error")

    async def probe(self) -> float:
        """Send one token through all stages; return the seconds it took.

        Raises:
            StageLostError: a stage is down.
            RefusedError: no answer came in time.
        """
        started = time.monotonic()
        request = Request(
            id=f"probe-{started}-{id(asyncio.current_task())}",
            prompt_ids=(int(self.base.tokenizer.eos_token_id),),
            sampling=Sampling(max_tokens=1),
            client="probe",
            deadline=started + _PROBE_S,
        )
        answer = await self.engine.answer(request)
        if answer.finish == "deadline":
            raise RefusedError(
                503, f"no token came through the stages in {_PROBE_S:g} s.", "not_ready", retry_after_s=5
            )
        return time.monotonic() - started

    async def _follow(
        self, call: Call, prompt: str, request: Request, choices: Sequence[str] = (), index: int = 0
    ) -> AsyncIterator[Piece | Answer]:
        """Yield the engine's events, and record the outcome in the ledger."""
        adapter = AdapterRef(request.adapter, call.adapter.folder) if call.adapter and request.adapter else None
        record, is_closed = AnswerRecord(call, prompt, len(request.prompt_ids), choices, index), False
        try:
            async with contextlib.aclosing(self.engine.ask(request, adapter)) as events:  # type: ignore[type-var]
                async for event in events:
                    if record.first_s is None:
                        record.first_s = time.monotonic() - record.started
                    if isinstance(event, Piece):
                        record.pieces.append(event.text)
                        yield event
                        continue
                    event.require_numbers()
                    record.answer, record.outcome = event, event.finish
                    if event.finish == "deadline":
                        seconds = self.config.limits.deadline_s
                        raise RefusedError(
                            408, f"no answer was complete in {seconds:g} s: ask for less, or later.", "deadline"
                        )
                    if event.finish == "grammar":
                        raise too_complex(event.fault)
                    self._ledger.close(record)
                    is_closed = True
                    yield event
        except Exception as error:
            record.outcome = as_refusal(error).code
            raise
        finally:
            if not is_closed:
                self._ledger.close(record)

    def require_admin(self, key: KeyRecord) -> None:
        """Raise RefusedError unless the key may change what is served."""
        if not key.is_admin:
            raise RefusedError(403, f"key {key.id!r} may not change what is served: use an admin key.", "not_admin")

    def describe_adapter(self, name: str) -> dict[str, object]:
        """Return the facts of an adapter, with the reason if it is refused."""
        facts: dict[str, object] = {"name": name, "versions": self.shelf.list_versions(name)}
        if self.config.require_approval:
            facts["unapproved"] = [version for version in self.shelf.list_unapproved(name) if version]
        try:
            adapter = self.shelf.find(name)
        except AdapterError as error:
            return facts | {"refused": str(error)}
        contract = adapter.contract
        return facts | {
            "current": adapter.version,
            "hash": adapter.hash,
            "bits": contract.bits,
            "rank": contract.rank,
            "template_date": adapter.template_date,
            "tasks": sorted(contract.task_names),
            "unknown": list(contract.adopted.unknown) if contract.adopted else [],
            "doubt": adapter.doubt,
            "loaded": adapter.engine_name in self.engine.snapshot.adapters,
        }
