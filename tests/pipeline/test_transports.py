"""Choice of transports by the machines of the stages."""

from __future__ import annotations

import pytest

from finlora.pipeline.transports import choose_hidden_state_links, choose_token_link

SHARED, MESSAGES = ["gpu", "messages"], ["messages"]


@pytest.mark.parametrize(
    ("transport", "machines", "expected"),
    [
        ("messages", ["a"], []),
        ("messages", [None, None, None], [((0, 1), MESSAGES), ((1, 2), MESSAGES)]),
        ("messages", ["a", "a", "b", "b"], [((0, 1), SHARED), ((1, 2), MESSAGES), ((2, 3), SHARED)]),
        ("nccl", ["a", "a", "b"], [(range(3), ["nccl"])]),
        ("gloo", [None, None], [(range(2), ["gloo"])]),
    ],
)
def test_hidden_states_share_gpu_memory_within_a_machine(transport, machines, expected):
    assert choose_hidden_state_links(transport, machines) == expected


@pytest.mark.parametrize(
    ("machines", "expected"),
    [
        (["a"], ((0,), ["local"])),
        ([None], ((0,), ["local"])),
        ([None, None], ((0, 1), ["socket"])),
        (["a", "b", "a"], ((0, 2), ["gpu", "socket"])),
        (["a", "a", "b"], ((0, 2), ["socket"])),
    ],
)
def test_tokens_share_gpu_memory_if_both_ends_are_on_one_machine(machines, expected):
    assert choose_token_link(machines) == expected
