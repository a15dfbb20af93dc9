"""Hidden states in messages."""

from __future__ import annotations

import pytest
import torch

from finlora.engine.messages import Message
from finlora.pipeline.hidden_states import MessageLink
from finlora.pipeline.links import StageInfo

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_arrive_as_they_were_sent(device, dtype):
    link = MessageLink(StageInfo(1, 3, 64, dtype, torch.device(device), "127.0.0.1"))
    for num_rows in (3, 500, 1):  # the buffer grows, and is reused
        sent = torch.randn(num_rows, 64, device=device).to(dtype)
        message = link.send(Message(None), sent).copy()
        assert message.shape == (num_rows, 64 * dtype.itemsize)
        read = message.view()
        read.setflags(write=False)  # as Ray's are
        arrived, stamps = link.receive(Message(None, read))
        assert stamps is None
        message[:] = 0  # its memory is reused for the next message
        assert (arrived.device.type, arrived.dtype) == (device, dtype)
        assert torch.equal(arrived, sent)
