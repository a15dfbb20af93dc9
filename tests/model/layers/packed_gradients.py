"""Loss and gradients of a training pass, and their comparison."""

from __future__ import annotations

import pytest
import torch

from finlora.data.encode import Encoded
from finlora.model.base import quiet_bitsandbytes
from finlora.model.lora import trainable_parameters

SHARED = tuple(range(10, 30))
# Prompts with a shared prefix, of different lengths, with answers of two to five tokens.
EXAMPLES = [Encoded(SHARED + tuple(range(3 + n, 8 + 4 * n)), tuple(range(200, 202 + n % 4))) for n in range(7)]


def gradients_of(model, module, batch, seed=0):
    torch.manual_seed(seed)
    with quiet_bitsandbytes():
        loss = module(batch)
        return float(loss.detach()), torch.autograd.grad(loss, list(trainable_parameters(model).values()))


def assert_equal(own, expected, rtol=1e-5):
    assert own[0] == pytest.approx(expected[0], rel=rtol)
    for mine, theirs in zip(own[1], expected[1], strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < rtol
