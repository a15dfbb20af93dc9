"""Hidden states in messages and out of them."""

from __future__ import annotations

import pytest
import torch

from finlora.pipeline.hidden_states import Letters

DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_states_arrive_as_they_were_sent(device, dtype):
    letters = Letters(dtype, torch.device(device))
    for num_rows in (3, 500, 1):  # more than before, and fewer
        sent = torch.randn(num_rows, 64, device=device).to(dtype)
        message = letters.pack(sent).copy()
        assert message.shape == (num_rows, 64 * dtype.itemsize)
        read = message.view()
        read.setflags(write=False)  # as Ray's are
        arrived = letters.unpack(read)
        message[:] = 0  # its memory serves for the next one
        assert (arrived.device.type, arrived.dtype) == (device, dtype)
        assert torch.equal(arrived, sent)
