"""The elementwise steps against transformers and autograd, and the bits of dropout."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from finlora.model.layers import elementwise
from finlora.model.layers.elementwise import draw_keep, drop_threshold, split_keep

T, H = 7, 16
P = 0.1


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seed_of(value):
    return torch.tensor(value, dtype=torch.int32)


def masks(seed, num_rows, width, num_copies=3):
    """(k, T, H) bool."""
    keep = draw_keep(seed_of(seed), torch.empty(num_rows, width), num_copies, drop_threshold(P))
    return split_keep(keep, num_copies)


def test_norm_and_its_gradient_equal_transformers():
    x, weight, grad = draw(T, H).requires_grad_(), draw(H, seed=1), draw(T, H, seed=2)
    module = LlamaRMSNorm(H, eps=1e-5)
    module.weight = torch.nn.Parameter(weight)
    out = module(x)
    out.backward(grad)
    assert torch.equal(elementwise.normalise(x.detach(), weight, 1e-5), out.detach())
    own = elementwise.normalise_backward(grad, x.detach(), weight, 1e-5, torch.zeros(T, H))
    torch.testing.assert_close(own, x.grad, rtol=1e-5, atol=1e-6)


def test_rotation_equals_transformers_and_turns_back():
    query = draw(T, 3, 8)
    angles = draw(T, 4, seed=1).repeat(1, 2)
    cosine, sine = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(
        query[None].transpose(1, 2), query[None].transpose(1, 2), cosine[None], sine[None]
    )
    own = elementwise.rotate(query, cosine, sine)
    torch.testing.assert_close(own, expected[0].transpose(0, 1))
    torch.testing.assert_close(elementwise.rotate(own, cosine, -sine), query, rtol=1e-5, atol=1e-5)


def test_gate_gradient_equals_autograd():
    both, grad = draw(T, 2 * H).requires_grad_(), draw(T, H, seed=1)
    first, second = both.chunk(2, -1)
    out = torch.nn.functional.silu(first) * second
    out.backward(grad)
    torch.testing.assert_close(elementwise.gate(both.detach()), out.detach())
    torch.testing.assert_close(elementwise.gate_backward(grad, both.detach()), both.grad)


def test_dropped_copies_and_their_gradient_agree_with_autograd():
    x, weight, threshold = draw(T, H), draw(H, seed=1), drop_threshold(P)
    bits = draw_keep(seed_of(5), x, 3, threshold)
    keep, kept_share = split_keep(bits, 3), 1 - threshold / 2**16
    normed, dropped = elementwise.normalise_and_drop(x, weight, 1e-5, bits, 3, threshold)
    torch.testing.assert_close(dropped, torch.where(keep, normed / kept_share, 0.0))
    leaf, grad, grad_dropped, residual = (
        x.clone().requires_grad_(),
        *(draw(*s, seed=3) for s in ((T, H), (3, T, H), (T, H))),
    )
    out = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5) * weight
    ((out * grad).sum() + (torch.where(keep, out / kept_share, 0.0) * grad_dropped).sum()).backward()
    own = elementwise.normalise_and_drop_backward(grad, grad_dropped, x, weight, 1e-5, residual, bits, threshold)
    torch.testing.assert_close(own, leaf.grad + residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, -7])
def test_dropout_keeps_its_share_everywhere(seed):
    keep = masks(seed, 400, 256).double()
    deviation = (P * (1 - P)) ** 0.5
    for dims, count in (((0, 1, 2), keep.numel()), ((1, 2), 400 * 256), ((0, 1), 3 * 400), ((0, 2), 3 * 256)):
        error = (keep.mean(dims) - (1 - P)).abs().max()
        assert float(error) < 5 * deviation / count**0.5


def test_dropout_of_copies_seeds_and_neighbours_is_unrelated():
    one, other = (masks(seed, 400, 256, num_copies=5).float() for seed in (3, 4))
    rows = [*one.flatten(1), *other.flatten(1), one[0].roll(1, 0).flatten(), one[0].roll(1, 1).flatten()]
    correlations = torch.corrcoef(torch.stack(rows)).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / (400 * 256) ** 0.5


def test_dropout_of_a_row_does_not_depend_on_the_rows_after_it():
    short, long = (masks(9, rows, 32) for rows in (20, 33))
    assert torch.equal(short, long[:, :20])
