"""Token masks of requests with a grammar, at the last stage: one matcher a request, fed with the tokens that were sampled here.

The next mask of a request depends on its last token. This stage is the first to know it, so the matchers are here: no mask passes
the other stages, and a request with a grammar can have a speculative row as any other. Before a stage samples, it reads the
tokens of the micro-batches before, feeds them to the matchers, and computes the masks on the host. On a GPU the pass is in the
queue by then and hides that time; the masks follow it in an asynchronous copy.

Shapes: M samples with a matcher, V vocabulary. A mask has a bit a token, in words of 32.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from finlora.engine.micro_batch import MicroBatch, Output
from finlora.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

_KEPT = 32
"""Compiled grammars that are kept for later requests with the same one."""
_MOST_THREADS = 8
_ALL = -1
"""Word of a mask that allows all its tokens."""


class Masks(NamedTuple):
    """Masks of a micro-batch."""

    rows: Sequence[int]
    """M indices of its samples, ascending."""
    bits: Tensor
    """(M, V / 32) int32 on the host, in pinned memory where the device is a GPU."""
    faults: Sequence[tuple[int, str]]
    """(index, reason) of samples whose grammar cannot be followed any further."""


@dataclass(slots=True)
class _Match:
    """Matcher of a request."""

    matcher: LLMatcher
    num_tokens: int = 0
    """Tokens that it was fed with."""
    is_over: bool = False
    """The end token was sampled, so what follows is a speculative row."""


class GrammarMasks:
    """Matchers of the requests in flight.

    Args:
        vocabulary: None: no request has a grammar.
        device: of the logits.
    """

    def __init__(self, vocabulary: Vocabulary | None, device: torch.device) -> None:
        self._vocabulary, self._is_gpu = vocabulary, device.type == "cuda"
        self._matches: dict[int, _Match] = {}
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._unread: list[tuple[Callable[[], Output], list[tuple[int, int]]]] = []
        """Outputs whose tokens the matchers were not fed with, each with (index of a sample, number of its matcher)."""
        self._executor: LLExecutor | None = None

    def clear(self) -> None:
        """Drop all matchers."""
        self._matches.clear()
        self._unread.clear()

    def fill(self, batch: MicroBatch) -> Masks | None:
        """Return the masks of a micro-batch's samples; None if none of its requests has a grammar.

        Waits for the tokens of earlier micro-batches.
        """
        for number in batch.released:
            self._matches.pop(number, None)
        if all(sample.matcher is None for sample in batch.samples):
            return None
        assert self._vocabulary is not None, "a stage that gets grammars has a vocabulary"
        vocabulary = self._vocabulary.open()
        self._feed(self._vocabulary.end_token_id)
        for number, grammar in batch.grammars:
            self._matches[number] = _Match(self._start(grammar))
        rows = [index for index, sample in enumerate(batch.samples) if sample.matcher is not None]
        shape = len(rows), -(-vocabulary.vocab_size // 32)
        bits = torch.full(shape, _ALL, dtype=torch.int32, pin_memory=self._is_gpu)
        open_matches: list[tuple[int, LLMatcher]] = []
        for index, row in enumerate(rows):
            sample = batch.samples[row]
            assert sample.matcher is not None
            match = self._matches[sample.matcher]
            if not match.is_over:
                assert match.num_tokens == sample.position, "a matcher has missed a token of its request"
                open_matches.append((index, match.matcher))
        self._compute(open_matches, bits)
        faults = [
            (rows[index], " ".join(matcher.get_error().split()))
            for index, matcher in open_matches
            if matcher.is_error()
        ]
        return Masks(rows, bits, faults)

    def follow(self, batch: MicroBatch, read: Callable[[], Output]) -> None:
        """Note that the matchers of a micro-batch wait for the tokens that it samples.

        Args:
            read: waits for the tokens.
        """
        numbers = [(index, each.matcher) for index, each in enumerate(batch.samples) if each.matcher is not None]
        if numbers:
            self._unread.append((read, numbers))

    def _feed(self, end_token_id: int) -> None:
        unread, self._unread = self._unread, []
        for read, numbers in unread:
            tokens = read().tokens
            for index, number in numbers:
                match, (token, _) = self._matches.get(number), tokens[index]
                if match is None or match.is_over:
                    continue
                match.num_tokens += 1
                match.is_over = token == end_token_id
                if not match.is_over:
                    # A token that was not allowed, as of a model that computes NaN, is a fault of the next sample.
                    match.matcher.consume_token(token)

    def _start(self, grammar: str) -> LLMatcher:
        """Return a matcher at its beginning; a known grammar is not compiled again."""
        assert self._vocabulary is not None
        if grammar not in self._compiled:
            self._compiled[grammar] = self._vocabulary.start(grammar)
            if len(self._compiled) > _KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return self._compiled[grammar].deep_copy()

    def _compute(self, matchers: Sequence[tuple[int, LLMatcher]], bits: Tensor) -> None:
        """Write the masks of matchers to their rows, in parallel."""
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(max(1, min(_MOST_THREADS, len(os.sched_getaffinity(0)) // 2)))
        num_rows, num_words = bits.shape
        pairs = [(matcher, index) for index, matcher in matchers]
        if pairs:
            self._executor.unsafe_compute_mask_ptr(pairs, bits.data_ptr(), 4 * num_words, num_rows)
