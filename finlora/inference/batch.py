"""Batch inference over whole test splits: implements `Engine` over stages in this process or in others.

After a stage crash, the stage is restarted and the unanswered prompts are submitted again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from finlora.engine.engine import EngineCore
from finlora.engine.request import Answer, Piece, Request, Sampling, normalise_choices
from finlora.errors import StageLostError

_logger = logging.getLogger(__name__)

_MAX_WAITING = 64
"""Requests in the queue: enough to fill a micro-batch, few enough to search at each admission."""
_MAX_LOSSES = 3
"""Stage losses without an answer in between, after which the error is raised: the cause may be the stage's machine."""


class BatchEngine:
    """Answers lists of prompts.

    Args:
        core: not used elsewhere at the same time.
        adapter: name of a loaded adapter; None: the base model alone.
        renew: restarts lost stages and returns a core over all; None: there is one process.
    """

    def __init__(self, core: EngineCore, adapter: str | None, renew: Callable[[], EngineCore] | None = None) -> None:
        self.core, self.adapter, self._renew = core, adapter, renew
        self._num_losses = 0
        """Stage losses since the last answer."""

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
            texts |= dict.fromkeys((request.id for request in left), "")  # drops partial texts of a lost attempt
            try:
                self._answer(left, answers, texts, on_done)
            except StageLostError as error:
                self._recover(error)
        return answers, texts

    def _answer(
        self,
        requests: Sequence[Request],
        answers: dict[str, Answer],
        texts: dict[str, str],
        on_done: Callable[[int], None],
    ) -> None:
        """Add the answers of all requests, and their texts."""
        # Prompts with a common prefix follow each other, so that it is still in the prefix cache.
        remaining = iter(sorted(requests, key=lambda request: request.prompt_ids))
        wanted = len(answers) + len(requests)

        def add(request_id: str, piece: Piece) -> None:
            texts[request_id] += piece.text

        while len(answers) < wanted:
            while self.core.scheduler.num_waiting < _MAX_WAITING and (request := next(remaining, None)) is not None:
                self.core.submit(request)
            if ended := self.core.step(add):
                for answer in ended:
                    answer.require_numbers()
                    answers[answer.request_id] = answer
                self._num_losses = 0
                on_done(len(answers))
            assert not self.core.is_stalled, "the core has no other user, so a request that cannot start now never will"

    def _recover(self, error: StageLostError) -> None:
        self._num_losses += 1
        if self._renew is None or self._num_losses >= _MAX_LOSSES:
            raise error
        _logger.warning("%s This evaluation retries: it submits the unanswered prompts again.", error)
        self.core = self._renew()
