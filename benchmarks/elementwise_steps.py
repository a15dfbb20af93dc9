"""Triton kernels of the elementwise steps beside torch.compile of the same steps, on one GPU: microseconds, and their difference.

    python benchmarks/elementwise_steps.py                                    # widths of 8B, 2,048 and 8,000 rows
    python benchmarks/elementwise_steps.py --width 576 --inner 1536 --rows 700

Both sides run in this process on the same numbers. Each time is the median of 30 calls; `GB/s` counts each input and output once.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from finlora.model.kernels import launch
from finlora.model.layers import elementwise, frozen_linear
from finlora.model.layers.elementwise import draw_keep, drop_threshold

REPEATS = 30


def make_arguments(
    rows: int, width: int, inner: int, heads: int
) -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Return each step with its arguments on the GPU, in bfloat16."""
    device = torch.device("cuda")

    def sample(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    x, weight, grad, residual = sample(rows, width), sample(width), sample(rows, width), sample(rows, width)
    threshold = drop_threshold(0.1)
    seed = torch.tensor(7, dtype=torch.int32, device=device)
    keep = draw_keep(seed, x, 3, threshold)
    both, part = sample(rows, 2 * inner), sample(rows, inner)
    size = width // heads
    turned, cosine = sample(rows, heads, size), sample(rows, size)
    held = torch.zeros(width, dtype=torch.bool, device=device)
    values = torch.randint(-127, 128, (width, width), dtype=torch.int8, device=device)
    scales = torch.rand(width, device=device)
    return {
        "normalise": (elementwise.normalise, (x, weight, 1e-5)),
        "draw_keep": (elementwise.draw_keep, (seed, x, 3, threshold)),
        "normalise_and_drop": (elementwise.normalise_and_drop, (x, weight, 1e-5, keep, 3, threshold)),
        "normalise_backward": (elementwise.normalise_backward, (grad, x, weight, 1e-5, residual)),
        "normalise_and_drop_backward": (
            elementwise.normalise_and_drop_backward,
            (grad, sample(3, rows, width), x, weight, 1e-5, residual, keep, threshold),
        ),
        "rotate": (elementwise.rotate, (turned, cosine, cosine)),
        "gate": (elementwise.gate, (both,)),
        "gate_backward": (elementwise.gate_backward, (part, both)),
        "_find_outliers": (frozen_linear._find_outliers, (x * 3,)),
        "_quantise_rows": (frozen_linear._quantise_rows, (x * 3, held)),
        "_unpack_int8": (frozen_linear._unpack_int8, (values, scales, torch.bfloat16)),
    }


def measure(run: Callable[[], Any]) -> float:
    """Return the median microseconds of a call."""
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(1_000_000)  # the host queues both events before the GPU reaches the first
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) * 1000)
    return statistics.median(times)


def compare(name: str, step: Callable[..., Any], arguments: tuple[Any, ...]) -> str:
    """Return a table row: microseconds of both sides, the kernel's rate, and the largest relative difference."""
    own_us, own = measure(lambda: step(*arguments)), step(*arguments)
    takes = launch.takes_kernels
    launch.takes_kernels = lambda _tensor: False
    try:
        compiled = torch.compile(step, dynamic=False)
        other_us, other = measure(lambda: compiled(*arguments)), compiled(*arguments)
    finally:
        launch.takes_kernels = takes
    pairs = list(zip(own, other, strict=True)) if isinstance(own, tuple) else [(own, other)]
    far = max(float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-9)) for a, b in pairs)
    tensors = [value for value in (*arguments, *(a for a, _ in pairs)) if isinstance(value, torch.Tensor)]
    rate = sum(value.numel() * value.element_size() for value in tensors) / own_us / 1000
    return f"| {name} | {own_us:.1f} | {other_us:.1f} | {rate:.0f} | {far:.1e} |"


def main() -> None:
    """Print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[2048, 8000])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=14336)
    parser.add_argument("--heads", type=int, default=32)
    options = parser.parse_args()
    for rows in options.rows:
        print(
            f"\n{rows} rows, {torch.cuda.get_device_name()}\n\n| step | kernel us | torch.compile us | GB/s | difference |"
        )
        print("| --- | --- | --- | --- | --- |")
        with torch.no_grad():
            for name, (step, arguments) in make_arguments(rows, options.width, options.inner, options.heads).items():
                print(compare(name, step, arguments), flush=True)


if __name__ == "__main__":
    main()
