"""Whether FinLoRA's packed steps learn what plain steps do: its loss curve beside two plain ones of other dropout masks.

    python benchmarks/loss_curves.py --works 8b-4bit-r4-ner-16 --data ~/finlora/data --base ~/llama-8b --tokenizer ...
    python benchmarks/loss_curves.py --works tiny-4bit-r4-synthetic_sentiment-4 --device cpu --steps 20

All three train on the same examples in the same order from the same adapter; options are those of train_throughput.py. The noise
is the root mean square difference of the two plain curves, averaged over windows of ten steps; FinLoRA's is its difference from
their mean, which for a third run of the same kind is 0.87 times the noise in the mean (the root of 3/4).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from sides import run_in_process

WINDOW = 10
SIDES = ("plain", "plain-again", "finlora")


def compare(curves: dict[str, list[float]]) -> tuple[float, float]:
    """Return the root mean square difference of both plain curves, and that of FinLoRA's from their mean."""
    first, second, ours = (curves[side] for side in SIDES)
    noise = statistics.fmean((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5
    own = statistics.fmean((c - (a + b) / 2) ** 2 for a, b, c in zip(first, second, ours, strict=True)) ** 0.5
    return noise, own


def main() -> None:
    """Train three times and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", required=True)
    parser.add_argument("--steps", type=int, default=200)
    known, others = parser.parse_known_args()
    script = str(Path(__file__).with_name("train_throughput.py"))
    num_windows = known.steps // WINDOW
    curves = {}
    for side in SIDES:
        # The plain sides run two windows more, to warm up, and all run a schedule of so many steps.
        repeats = num_windows - 2 if side != "finlora" else num_windows
        argv = [*others, "--steps", str(WINDOW), "--repeats", str(repeats), "--warm-up", "0"]
        row = run_in_process(script, known.works, side, argv)
        if "error" in row:
            sys.exit(f"{side}: {row['error']}")
        curves[side] = row["losses"]
    print(f"{'steps':>6}" + "".join(f"{side:>14}" for side in SIDES))
    for window in range(num_windows):
        values = "".join(f"{curves[side][window]:14.4f}" for side in SIDES)
        print(f"{(window + 1) * WINDOW:6}{values}")
    noise, own = compare(curves)
    print(
        f"two plain runs differ by {noise:.4f}, FinLoRA from their mean by {own:.4f}: {own / max(noise, 1e-9):.2f} times"
    )


if __name__ == "__main__":
    main()
