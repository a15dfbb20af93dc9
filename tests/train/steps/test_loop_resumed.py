"""A run that resumes in a new process equals an undisturbed run bit for bit, on a GPU too; and the conditions there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finlora.model.layers import elementwise

SCRIPT = Path(__file__).with_name("resumed_steps.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="on a CPU steps are not compiled"),
]


def train(folder, start, stop, dropout):
    """Return the losses of steps start + 1 to stop, run in a separate process, and the adapter after them."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(start), str(stop), dropout],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), torch.load(folder / f"{stop}.pt")["parameters"]


@pytest.mark.parametrize("dropout", ["0.1", "0.0"])
def test_resumed_run_equals_the_undisturbed_one_bit_for_bit(tmp_path, dropout):
    whole, expected = train(tmp_path, 0, 6, dropout)
    first, _ = train(tmp_path, 0, 3, dropout)
    rest, found = train(tmp_path, 3, 6, dropout)
    assert [*first, *rest] == whole
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("width", [576, 2048])
@pytest.mark.parametrize(
    "name", ["normalise", "normalise_and_drop", "normalise_backward", "normalise_and_drop_backward"]
)
def test_sums_do_not_depend_on_the_calls_before(name, width):
    """640 rows in a process that starts with them, and in one that starts with 32: the first call may choose warps a row."""
    draw = torch.Generator("cuda").manual_seed(0)

    def arguments_of(rows):
        x, grad, residual = torch.randn(3, 640, width, generator=draw, device="cuda").bfloat16()[:, :rows]
        keep = torch.randint(0, 8, (640, width), generator=draw, device="cuda", dtype=torch.uint8)[:rows]
        weight = torch.randn(width, generator=draw, device="cuda").bfloat16()
        dropped = torch.randn(3, 640, width, generator=draw, device="cuda").bfloat16()[:, :rows].contiguous()
        return {
            "normalise": (x, weight, 1e-5),
            "normalise_and_drop": (x, weight, 1e-5, keep, 3, 6553),
            "normalise_backward": (grad, x, weight, 1e-5, residual),
            "normalise_and_drop_backward": (grad, dropped, x, weight, 1e-5, residual, keep, 6553),
        }[name]

    long, short, found = arguments_of(640), arguments_of(32), []
    with torch.no_grad():
        for order in ((long,), (short, long), (long, short, long)):
            torch._dynamo.reset()
            step = elementwise.fused_sum(getattr(elementwise, name).__wrapped__)
            outputs = [step(*arguments) for arguments in order]
            last = outputs[-1]
            found.append(torch.cat([part.flatten() for part in (last if isinstance(last, tuple) else (last,))]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_masks_are_the_same_compiled_for_one_length_or_for_any_and_on_the_cpu():
    plain = elementwise.draw_keep.__wrapped__
    for width in (576, 4096):
        x = torch.empty(700, width)
        expected = plain(torch.tensor(123456789, dtype=torch.int32), x, 3, 6553)
        seed = torch.tensor(123456789, dtype=torch.int32, device="cuda")
        for settings in ({"dynamic": False}, {"dynamic": True}):
            torch._dynamo.reset()
            found = torch.compile(plain, **settings)(seed, x.cuda(), 3, 6553)
            assert torch.equal(found.cpu(), expected)
        assert torch.equal(plain(seed, x.cuda(), 3, 6553).cpu(), expected)
