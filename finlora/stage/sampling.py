"""Sampling at the last stage. A row's token depends on its own logits, grammar, seed and position, never on its batch.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from finlora.engine.micro_batch import Output, Sample
from finlora.stage.grammar_masks import Masks
from finlora.stage.upload import download, upload


def sample(logits: Tensor, samples: Sequence[Sample], masks: Masks | None = None) -> tuple[Tensor, Tensor]:
    """Return a token for each row, and its log-probability before grammar, temperature and filters.

    Temperature 0 takes the likeliest token. Otherwise one uniform number, a function of seed and position alone, selects a token
    by the cumulative probabilities of the nucleus (arXiv:1904.09751, section 3.1), likeliest token first. In turn act: grammar,
    logit bias, temperature, min_p, top_k, top_p, as in vLLM. The host does not wait.

    Shapes: (N, V) float32 -> (N,) int64, (N,) float32.
    """
    allowed = logits if masks is None else restrict(logits, masks)
    allowed = add_bias(allowed, samples)
    tokens = allowed.argmax(-1)
    for row, each in enumerate(samples):
        if each.temperature > 0:
            tokens[row] = _sample_token(allowed[row], each)
    return tokens, choice_log_probs(logits, tokens)


def restrict(logits: Tensor, masks: Masks) -> Tensor:
    """Return the logits with minus infinity at tokens that a row's grammar forbids. Other rows keep their values.

    Shapes: (N, V) float32, masks of M rows -> (N, V).
    """
    rows = upload(masks.rows, logits.device)
    # Bytes, least significant bit first: token 8 b + j is bit j of byte b, as llguidance writes them.
    bits = masks.bits.view(torch.uint8).to(logits.device, non_blocking=True)
    shifts = torch.arange(8, dtype=torch.uint8, device=logits.device)
    is_allowed = (bits[:, :, None] >> shifts & 1).flatten(1)[:, : logits.shape[1]].bool()
    # A head may have more columns than the tokenizer has tokens.
    is_allowed = torch.nn.functional.pad(is_allowed, (0, logits.shape[1] - is_allowed.shape[1]))
    if len(rows) == len(logits):  # every row has one, in the order of the rows
        return logits.masked_fill(~is_allowed, -torch.inf)
    return logits.index_copy(0, rows, logits[rows].masked_fill_(~is_allowed, -torch.inf))


def add_bias(logits: Tensor, samples: Sequence[Sample]) -> Tensor:
    """Return the logits with the biases of their rows added. Shapes: (N, V) -> (N, V)."""
    found = [(row, *pair) for row, each in enumerate(samples) if each.filters for pair in each.filters.bias]
    if not found:
        return logits
    rows, tokens, values = zip(*found, strict=True)
    added = upload(values, logits.device, torch.float32)
    return logits.index_put((upload(rows, logits.device), upload(tokens, logits.device)), added, accumulate=True)


def list_top(logits: Tensor, samples: Sequence[Sample]) -> tuple[list[tuple[int, int]], Tensor]:
    """Return (index, number) of the samples that ask for likeliest tokens, and those tokens with their log-probabilities.

    Shapes: (N, V) float32 -> R pairs, (2, R, K) float64 with K the largest number: tokens, then log-probabilities, likeliest
    first.
    """
    asked = [(row, each.filters.num_top) for row, each in enumerate(samples) if each.filters and each.filters.num_top]
    if not asked:
        return [], logits.new_empty(2, 0, 0, dtype=torch.float64)
    own = logits[upload([row for row, _ in asked], logits.device)]
    values, tokens = own.topk(min(max(number for _, number in asked), own.shape[1]), -1)
    return asked, torch.stack([tokens.double(), (values - own.logsumexp(-1, keepdim=True)).double()])


def choice_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of a given token of each row. Shapes: (N, V) float32, (N,) -> (N,)."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _sample_token(logits: Tensor, sample: Sample) -> Tensor:
    """Shapes: (V,) -> ()."""
    probabilities, order = torch.softmax(logits.double() / sample.temperature, -1).sort(descending=True, stable=True)
    total = probabilities.cumsum(0)
    share: float | Tensor = sample.top_p
    before = total - probabilities
    if sample.filters and (sample.filters.min_p or sample.filters.top_k):
        count = (probabilities >= sample.filters.min_p * probabilities[0]).sum()
        if sample.filters.top_k:
            count = count.clamp(max=sample.filters.top_k)
        share = sample.top_p * total[count - 1]  # of what is left
        before = torch.where(torch.arange(len(total), device=total.device) < count, before, torch.inf)
    # The token whose probability takes the sum over top_p belongs to the nucleus.
    last = (before < share).sum() - 1
    uniform = random.Random(f"{sample.seed} {sample.position}").random()
    index = torch.searchsorted(total, uniform * total[last], right=True)
    return order[torch.minimum(index, last)]


class Unread:
    """Async device-to-host copy of a micro-batch's sampled tokens and log-probabilities.

    Args:
        number: of the micro-batch.
        tokens: (N,) int64, sampled.
        log_probs: (N,) of the sampled tokens.
        scored: (M,) log-probabilities of the tokens that the micro-batch scores.
        tops: of `list_top`.
        faults: of its samples (Output).
    """

    def __init__(
        self,
        number: int,
        tokens: Tensor,
        log_probs: Tensor,
        scored: Tensor,
        tops: tuple[Sequence[tuple[int, int]], Tensor],
        faults: Sequence[tuple[int, str]] = (),
    ) -> None:
        self.number, self.tokens, self._faults = number, tokens, faults
        self._asked, top = tops
        self._num_top = top.shape[2]
        # One copy for all.
        self._read = download(torch.cat([top.flatten(), tokens.double(), log_probs.double(), scored.double()]))

    def read(self) -> Output:
        """Wait for the copy and return the micro-batch's output. It can be read more than once."""
        numbers, count, width = self._read(), len(self.tokens), self._num_top
        size = len(self._asked) * width
        ids, log_probs, numbers = numbers[:size], numbers[size : 2 * size], numbers[2 * size :]
        tops = []
        for number, (index, wanted) in enumerate(self._asked):
            own = slice(number * width, number * width + wanted)
            tops.append((index, tuple(zip(map(int, ids[own]), log_probs[own], strict=True))[:width]))
        tokens = zip(map(int, numbers[:count]), numbers[count : 2 * count], strict=True)
        return Output(self.number, list(tokens), numbers[2 * count :], tops=tops, faults=self._faults)


class Stopwatch:
    """Device time of the work queued between construction and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._moments = [self._now()]

    def stop(self) -> None:
        """End the measured interval."""
        self._moments.append(self._now())

    def read(self) -> float:
        """Wait for the device and return the seconds."""
        began, ended = self._moments
        if isinstance(began, float) or isinstance(ended, float):
            return ended - began  # type: ignore[operator]
        ended.synchronize()
        return float(began.elapsed_time(ended)) * 1e-3

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
