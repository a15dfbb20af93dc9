"""Tokens from logits at the last stage. What a row draws depends on its own logits, seed and position, never on its batch.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from finlora.engine.microbatch import Draw


def sample(logits: Tensor, draws: Sequence[Draw]) -> tuple[Tensor, Tensor]:
    """Choose a token for each row and return them with their log-probabilities before temperature and top_p.

    Temperature 0 takes the likeliest token. Otherwise the token is found where one uniform number, drawn from seed and position
    alone, falls into the cumulated probabilities of the nucleus (arXiv:1904.09751, section 3.1), the likeliest token first.
    Nothing waits for the device.

    Shapes: (N, V) float32 -> (N,) int64, (N,) float32.
    """
    tokens = logits.argmax(-1)
    for row, draw in enumerate(draws):
        if draw.temperature > 0:
            tokens[row] = _draw_token(logits[row], draw)
    return tokens, choice_log_probs(logits, tokens)


def choice_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-probability of a given token of each row. Shapes: (N, V) float32, (N,) -> (N,)."""
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)


def _draw_token(logits: Tensor, draw: Draw) -> Tensor:
    """Shapes: (V,) -> ()."""
    probabilities, order = torch.softmax(logits.double() / draw.temperature, -1).sort(descending=True, stable=True)
    total = probabilities.cumsum(0)
    # The token that carries the sum over top_p belongs to the nucleus.
    last = (total - probabilities < draw.top_p).sum() - 1
    uniform = random.Random(f"{draw.seed} {draw.position}").random()
    place = torch.searchsorted(total, uniform * total[last], right=True)
    return order[torch.minimum(place, last)]
