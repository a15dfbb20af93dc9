"""Whole test splits through the engine: many prompts in, all answers out; meets `Engine` over stages of any place.

A stage that dies in the midst of thousands of prompts is started again, and what was not answered is asked anew.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from finlora.engine.engine import EngineCore
from finlora.engine.request import Answer, Piece, Request, Sampling, normalise_choices
from finlora.errors import StageLostError

_logger = logging.getLogger(__name__)

_MAX_WAITING = 64
"""Requests in line: enough to fill a micro-batch, few enough to look through at each admission."""
_MAX_LOSSES = 3
"""Losses without an answer in between, at which it is given up: a stage that dies again and again may do so for where it runs."""


class BatchEngine:
    """Answers lists of prompts.

    Args:
        core: used by nobody else meanwhile.
        adapter: name under which an adapter is loaded; None: the base alone.
        renew: brings lost stages back and returns a core over all; None: they cannot be lost alone.
    """

    def __init__(self, core: EngineCore, adapter: str | None, renew: Callable[[], EngineCore] | None = None) -> None:
        self.core, self.adapter, self._renew = core, adapter, renew
        self._num_losses = 0
        """Since the last answer."""

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
        answers: dict[str, Answer] = {}
        texts: dict[str, str] = {}
        while left := [request for request in requests if request.id not in answers]:
            texts |= dict.fromkeys((request.id for request in left), "")  # a part of one may have come
            try:
                self._answer(left, answers, texts, on_done)
            except StageLostError as error:
                self._bring_back(error)
        return answers, texts

    def _answer(
        self,
        requests: Sequence[Request],
        answers: dict[str, Answer],
        texts: dict[str, str],
        on_done: Callable[[int], None],
    ) -> None:
        """Add the answers of all requests, and their texts."""
        # Prompts that begin alike follow each other, so that their beginning is still in the cache.
        to_come = iter(sorted(requests, key=lambda request: request.prompt_ids))
        wanted = len(answers) + len(requests)

        def add(request_id: str, piece: Piece) -> None:
            texts[request_id] += piece.text

        while len(answers) < wanted:
            while self.core.scheduler.num_waiting < _MAX_WAITING and (request := next(to_come, None)) is not None:
                self.core.submit(request)
            if ended := self.core.step(add):
                for answer in ended:
                    answer.require_numbers()
                    answers[answer.request_id] = answer
                self._num_losses = 0
                on_done(len(answers))
            assert not self.core.is_stalled, "nobody else uses the core, so what cannot start now never will"

    def _bring_back(self, error: StageLostError) -> None:
        self._num_losses += 1
        if self._renew is None or self._num_losses >= _MAX_LOSSES:
            raise error
        _logger.warning("%s This evaluation does so by itself: what was not answered is asked anew.", error)
        self.core = self._renew()
