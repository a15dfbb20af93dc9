"""Loss curves of FinLoRA's packed steps and of two plain runs with different dropout masks.

    python benchmarks/loss_curves.py --works 8b-4bit-r4-ner-16 --data ~/finlora/data --base ~/llama-8b --tokenizer ...
    python benchmarks/loss_curves.py --works tiny-4bit-r4-synthetic_sentiment-4 --device cpu --steps 40

All train on the same examples in the same order from the same adapter; options as in train_throughput.py. The noise is the root
mean square difference of the two plain curves, averaged over windows of ten steps. FinLoRA's value is its difference from their
mean; for a third plain run it would be 0.87 times the noise on average (the root of 3/4). Without dropout (`--dropout 0`) plain
runs are equal, so FinLoRA is compared with one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from sides import run_in_process

WINDOW = 10
SIDES = ("plain", "plain-again", "finlora")


def compare(first: list[float], second: list[float], ours: list[float]) -> tuple[float, float]:
    """Return the root mean square difference of both plain curves, and that of FinLoRA's from their mean."""
    noise = statistics.fmean((a - b) ** 2 for a, b in zip(first, second, strict=True)) ** 0.5
    own = statistics.fmean((c - (a + b) / 2) ** 2 for a, b, c in zip(first, second, ours, strict=True)) ** 0.5
    return noise, own


def main() -> None:
    """Train three times and print the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--works", required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.1)
    known, others = parser.parse_known_args()
    if known.steps < 3 * WINDOW:
        parser.error(f"--steps {known.steps}: expected at least {3 * WINDOW}, three windows of {WINDOW}")
    script = str(Path(__file__).with_name("train_throughput.py"))
    num_windows = known.steps // WINDOW
    curves: dict[str, list[float]] = {}
    sides = [side for side in SIDES if known.dropout or side != "plain-again"]
    for side in sides:
        # The plain sides run two more windows, to warm up; the schedule has this many steps on all sides.
        repeats = num_windows - 2 if side != "finlora" else num_windows
        argv = [*others, "--dropout", str(known.dropout), "--steps", str(WINDOW)]
        argv += ["--repeats", str(repeats), "--warm-up", "0"]
        row = run_in_process(script, known.works, side, argv)
        if "error" in row:
            sys.exit(f"{side}: {row['error']}")
        curves[side] = row["losses"]
    print(f"{'steps':>6}" + "".join(f"{side:>14}" for side in sides))
    for window in range(num_windows):
        values = "".join(f"{curves[side][window]:14.4f}" for side in sides)
        print(f"{(window + 1) * WINDOW:6}{values}")
    noise, own = compare(curves["plain"], curves.get("plain-again", curves["plain"]), curves["finlora"])
    if noise:
        print(f"two plain runs differ by {noise:.4f}, FinLoRA from their mean by {own:.4f}: {own / noise:.2f} times")
    else:
        print(f"FinLoRA differs from the plain run by {own:.4f}")


if __name__ == "__main__":
    main()
