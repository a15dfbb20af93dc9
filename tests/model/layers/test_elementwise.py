"""The fused steps against transformers and autograd, the bits of dropout, and compilation of each into one graph."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from finlora.model.layers import elementwise, frozen_linear
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


def arguments_of(rows):
    """Return the arguments of each fused step by name, in bfloat16 as on a GPU."""
    x, weight, threshold = draw(rows, H).bfloat16(), draw(H).bfloat16(), drop_threshold(P)
    keep = draw_keep(seed_of(5), x, 3, threshold)
    head = draw(rows, 4, 8).bfloat16()
    integers = torch.randint(-9, 9, (rows, H), generator=torch.Generator().manual_seed(0))
    return {
        "normalise": (x, weight, 1e-5),
        "draw_keep": (seed_of(5), x, 3, threshold),
        "normalise_and_drop": (x, weight, 1e-5, keep, 3, threshold),
        "normalise_backward": (x, x * 2, weight, 1e-5, x),
        "normalise_and_drop_backward": (x, draw(3, rows, H).bfloat16(), x, weight, 1e-5, x, keep, threshold),
        "rotate": (head, head[:, 0], head[:, 1]),
        "gate": (torch.cat([x, x], 1),),
        "gate_backward": (x, torch.cat([x, x], 1)),
        "_find_outliers": (x * 4,),
        "_quantise_rows": (x * 4, weight > 0),
        "_take_columns": (x, torch.arange(4), torch.tensor([True, False, True, True])),
        "_scale_product": (integers.int(), x[:, 0].float(), weight.float(), torch.bfloat16),
        "_unpack_int8": (integers.to(torch.int8), x[:, 0].float(), torch.bfloat16),
    }


@pytest.mark.parametrize("name", sorted(arguments_of(2)))
def test_step_compiles_in_one_piece_for_changing_lengths(name):
    """Traced as on a GPU, but run without code generation: a break in the graph or a frozen length would raise."""
    step = getattr(elementwise, name, None) or getattr(frozen_linear, name)
    compiled = torch.compile(step.__wrapped__, backend="aot_eager", fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for rows in (32, 48, 80, 96):
            arguments = arguments_of(rows)[name]
            torch.testing.assert_close(compiled(*arguments), step(*arguments))
    torch._dynamo.reset()


def test_every_compiled_step_is_tried():
    found = {
        name
        for module in (elementwise, frozen_linear)
        for name, value in vars(module).items()
        if hasattr(value, "__wrapped__") and value.__module__ == module.__name__
    }
    assert found == set(arguments_of(2))


SUMS = ["normalise", "normalise_and_drop", "normalise_and_drop_backward", "normalise_backward"]
"""Steps that sum over rows; the compiler chooses the order of summation."""


def test_steps_that_sum_over_rows_are_known():
    """A step whose code has a mean or a sum of floats must not be compiled by its first call's rows."""
    found = {name for name in arguments_of(2) if ".mean(" in step_source(name) or "_inverse_rms(" in step_source(name)}
    found |= {name for name in arguments_of(2) if "_norm_gradient(" in step_source(name)}
    assert sorted(found) == SUMS


def step_source(name):
    return inspect.getsource((getattr(elementwise, name, None) or getattr(frozen_linear, name)).__wrapped__)


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("rows", [(40, 3, 1, 2100), (1, 3, 40)])
def test_kernel_of_a_sum_does_not_depend_on_the_calls_before(name, rows, monkeypatch):
    """One kernel for any number of rows from two on, with the same layout whatever the first call."""
    laid_out_for, compiles = [], []
    calls = [[copy.copy(value) for value in arguments_of(count)[name]] for count in rows]
    assert all(len({id(value) for value in arguments}) == len(arguments) for arguments in calls), (
        "a layer passes no tensor twice"
    )

    def backend(graph, inputs):
        values = [node.meta["example_value"] for node in graph.graph.find_nodes(op="placeholder")]
        count = next(value.shape[-2] for value in values if isinstance(value, torch.Tensor) and value.dim() > 1)
        is_variable = isinstance(count, torch.SymInt)
        laid_out_for.append(
            count.node.shape_env.var_to_hint_override.get(count.node.expr) if is_variable else f"{count} alone"
        )
        return graph.forward

    def compile_recorded(function, **settings):
        if function is plain:  # torch compiles some of its own, once imported
            compiles.append(settings)
        return torch._dynamo.optimize(backend, nopython=True)(function)

    torch._dynamo.reset()
    monkeypatch.setattr(elementwise, "_is_on_gpu", lambda value: True)
    monkeypatch.setattr(torch, "compile", compile_recorded)
    plain = getattr(elementwise, name).__wrapped__
    step = elementwise.fused_sum(plain)
    with torch.no_grad():
        for arguments in calls:
            torch.testing.assert_close(step(*arguments), plain(*arguments))
            assert not any(hasattr(value, "_dynamo_dynamic_indices") for value in arguments)
    assert compiles == [{"options": {"deterministic": True}}]
    assert sorted(map(str, laid_out_for)) == [*(["1 alone"] if 1 in rows else []), str(elementwise._ASSUMED_ROWS)]
    torch._dynamo.reset()
