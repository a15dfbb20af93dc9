"""Time of the parts of an 8-bit product, and of the same product in bfloat16: one decoder layer of Llama-3.1 on a GPU.

    python benchmarks/int8_products.py                        # the shapes of 8B at 704, 1,472 and 1,984 rows
    python benchmarks/int8_products.py --size 70b --rows 1472
    python benchmarks/int8_products.py --device cpu --size tiny --rows 32 --repeats 2

Forward: find columns with outliers and choose the strongest, quantise rows, multiply in int8, rescale, and add the outlier
columns in 16 bit, on a GPU in the product's kernel. Backward: unpack the weight and multiply in 16 bit. Each part is captured as
a CUDA graph of `repeats` runs, to exclude launches; microseconds, median of five replays. Ratio: 8 bit over bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from finlora.formula.llama import LLAMA_8B, LLAMA_70B, PRODUCTS, LlamaShape, Product
from finlora.model.layers import frozen_linear

SHAPES = {
    "8b": LLAMA_8B,
    "70b": LLAMA_70B,
    "tiny": LlamaShape(
        hidden_size=64, intermediate_size=224, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=2048
    ),
}


def time_microseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the time of one run."""
    run()
    if device.type != "cuda":
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - started) / repeats * 1e6
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            run()
    seconds = []
    for _ in range(5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(start.elapsed_time(end) / 1000 / repeats)
    return statistics.median(seconds) * 1e6


def measure(shape: LlamaShape, name: Product, num_rows: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Time a product's parts at `num_rows` rows."""
    sizes = [projection.size(shape) for projection in PRODUCTS[name]]
    num_out, num_in = sum(out for out, _ in sizes), sizes[0][1]
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randint(-127, 128, (num_out, num_in), dtype=torch.int8, device=device, generator=generator)
    weight = frozen_linear.Int8Weight((values, torch.rand(num_out, device=device, generator=generator)), torch.bfloat16)
    dense = frozen_linear.DenseWeight(torch.randn(num_out, num_in, device=device, generator=generator).bfloat16())
    x = torch.randn(num_rows, num_in, device=device, generator=generator).bfloat16()
    x[:, :3] *= 10
    grad = torch.randn(num_rows, num_out, device=device, generator=generator).bfloat16()
    strength, columns = torch.topk(frozen_linear._find_outliers(x), min(frozen_linear.MAX_OUTLIERS, num_in))
    held_back = torch.zeros(num_in, dtype=torch.bool, device=device).scatter_(0, columns, strength > 0)
    quantised, row_scales = frozen_linear._quantise_rows(x, held_back)
    few = frozen_linear._unpack_int8(values[:, columns], weight.scales, torch.bfloat16)
    parts: dict[str, Callable[[], Any]] = {
        "bf16 forward": lambda: dense.forward(x),
        "bf16 backward": lambda: dense.backward(grad),
        "8-bit forward": lambda: weight.forward(x),
        "8-bit backward": lambda: weight.backward(grad),
        "  find outliers": lambda: frozen_linear._find_outliers(x),
        "  quantise rows": lambda: frozen_linear._quantise_rows(x, held_back),
        "  gather columns": lambda: frozen_linear._unpack_int8(values[:, columns], weight.scales, torch.bfloat16),
        "  unpack weight": lambda: frozen_linear._unpack_int8(values, weight.scales, torch.bfloat16),
        "  int8 product alone": lambda: torch._int_mm(quantised, values.t()),
    }
    if device.type == "cuda":
        from finlora.model.kernels.int8_prefill import choose_columns, many_int8

        outliers, few_x = frozen_linear._find_outliers(x), x[:, columns] * (strength > 0)
        parts["  strongest columns"] = lambda: choose_columns(outliers, len(columns))
        parts["  product, rescaled"] = lambda: many_int8(quantised, row_scales, values, weight.scales, few_x, few, None)
    return {part: time_microseconds(run, device, repeats) for part, run in parts.items()}


def main() -> None:
    """Print a table for each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="8b")
    parser.add_argument("--rows", type=int, nargs="+", default=[704, 1472, 1984])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    for num_rows in arguments.rows:
        table = {name: measure(SHAPES[arguments.size], name, num_rows, device, arguments.repeats) for name in PRODUCTS}
        print(f"{arguments.size}, {num_rows:,} rows, microseconds")
        print(f"{'':20}" + "".join(f"{name:>10}" for name in PRODUCTS) + f"{'sum':>10}")
        for part in table["qkv"]:
            row = [table[name][part] for name in PRODUCTS]
            print(f"{part:20}" + "".join(f"{value:10.1f}" for value in row) + f"{sum(row):10.1f}")
        for way in ("forward", "backward"):
            pair = [sum(table[name][f"{bits} {way}"] for name in PRODUCTS) for bits in ("8-bit", "bf16")]
            print(f"{way} ratio {pair[0] / pair[1]:.2f}")


if __name__ == "__main__":
    main()
