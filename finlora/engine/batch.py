"""Whole test splits through the engine: many prompts in, all answers out; meets `Engine` over stages of any place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from finlora.engine.drive import EngineCore
from finlora.engine.request import Answer, Piece, Request, Sampling, normalise_choices

_MAX_WAITING = 64
"""Requests in line: enough to fill a micro-batch, few enough to look through at each admission."""


class BatchEngine:
    """Answers lists of prompts.

    Args:
        core: used by nobody else meanwhile.
        adapter: name under which an adapter is loaded; None: the base alone.
    """

    def __init__(self, core: EngineCore, adapter: str | None) -> None:
        self.core, self.adapter = core, adapter

    def score_choices(
        self,
        prompts: Sequence[Sequence[int]],
        choices: Sequence[Sequence[Sequence[int]]],
        on_done: Callable[[int], None],
    ) -> list[list[float]]:
        requests = [
            Request(
                id=str(number),
                prompt_ids=tuple(prompt),
                adapter=self.adapter,
                choices=tuple(tuple(choice) for choice in own),
            )
            for number, (prompt, own) in enumerate(zip(prompts, choices, strict=True))
        ]
        answers, _ = self._run(requests, on_done)
        return [normalise_choices(answers[request.id].log_probs) for request in requests]

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, on_done: Callable[[int], None]
    ) -> list[str]:
        sampling = Sampling(max_tokens=max_new_tokens)
        requests = [
            Request(id=str(number), prompt_ids=tuple(prompt), adapter=self.adapter, sampling=sampling)
            for number, prompt in enumerate(prompts)
        ]
        _, texts = self._run(requests, on_done)
        return [texts[request.id] for request in requests]

    def _run(
        self, requests: Sequence[Request], on_done: Callable[[int], None]
    ) -> tuple[dict[str, Answer], dict[str, str]]:
        # Prompts that begin alike follow each other, so that their beginning is still in the cache.
        to_come = iter(sorted(requests, key=lambda request: request.prompt_ids))
        answers: dict[str, Answer] = {}
        texts = {request.id: "" for request in requests}

        def add(request_id: str, piece: Piece) -> None:
            texts[request_id] += piece.text

        while len(answers) < len(requests):
            while self.core.scheduler.num_waiting < _MAX_WAITING and (request := next(to_come, None)) is not None:
                self.core.submit(request)
            if ended := self.core.step(add):
                for answer in ended:
                    answer.require_numbers()
                    answers[answer.request_id] = answer
                on_done(len(answers))
            assert not self.core.is_stalled, "nobody else uses the core, so what cannot start now never will"
        return answers, texts
