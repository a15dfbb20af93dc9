"""Choice of the transports of hidden states and of sampled tokens, by where the stages run.

To add a transport, write a class that implements a protocol of links.py and name it here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from finlora.config import Transport
from finlora.pipeline.links import HiddenStateLink, StageInfo, TokenLink

HiddenStateTransport = Transport | Literal["gpu"]
TokenTransport = Literal["local", "socket", "gpu"]


def make_hidden_state_link(transport: HiddenStateTransport, stage: StageInfo) -> HiddenStateLink:
    if transport == "gpu":  # imported only here: the CPU build of torch has neither Triton nor cuda-bindings
        from finlora.pipeline.hidden_states_gpu import GpuLink

        return GpuLink(stage)
    if transport == "messages":
        from finlora.pipeline.hidden_states import MessageLink

        return MessageLink(stage)
    from finlora.pipeline.hidden_states_distributed import DistributedLink

    return DistributedLink(stage, transport)


def make_token_link(transport: TokenTransport, stage: StageInfo) -> TokenLink:
    if transport == "gpu":
        from finlora.pipeline.sampled_tokens_gpu import GpuTokenLink

        return GpuTokenLink(stage)
    from finlora.pipeline.sampled_tokens import LocalTokenLink, SocketTokenLink

    return LocalTokenLink(stage) if transport == "local" else SocketTokenLink(stage)


class HiddenStateChoice(NamedTuple):
    """Consecutive stages that join one link."""

    stages: Sequence[int]
    transports: Sequence[HiddenStateTransport]
    """The best first; one that does not connect the stages gives way to the next."""


class TokenChoice(NamedTuple):
    """Stages at the ends of a token link: first and last, or the only one."""

    stages: Sequence[int]
    transports: Sequence[TokenTransport]
    """As of HiddenStateChoice."""


def choose_hidden_state_links(transport: Transport, machines: Sequence[str | None]) -> list[HiddenStateChoice]:
    """Return the links that take hidden states through all stages.

    Args:
        transport: of the config. With `messages`, stages on GPUs of one machine share GPU memory where they can.
        machines: for each stage a name of the machine whose GPU it has; None: it computes on CPU.
    """
    if transport != "messages":
        return [HiddenStateChoice(range(len(machines)), [transport])]
    choices = []
    for index in range(len(machines) - 1):
        can_share = _may_share_gpu_memory(machines[index], machines[index + 1])
        choices.append(HiddenStateChoice((index, index + 1), ["gpu", "messages"] if can_share else ["messages"]))
    return choices


def choose_token_link(machines: Sequence[str | None]) -> TokenChoice:
    """Return the link that takes sampled tokens from the last stage to the first; `machines` as above."""
    if len(machines) == 1:
        return TokenChoice((0,), ["local"])
    can_share = _may_share_gpu_memory(machines[0], machines[-1])
    return TokenChoice((0, len(machines) - 1), ["gpu", "socket"] if can_share else ["socket"])


def _may_share_gpu_memory(machine: str | None, other: str | None) -> bool:
    return machine is not None and machine == other
