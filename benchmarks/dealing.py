"""Share of a step in which workers compute, if each waits for the one with the most tokens: shared in turn and by length.

    python benchmarks/dealing.py --data ~/finlora/data --base ~/llama-8b --tasks ner fpb

Counts tokens of the prepared train splits, not time; reads no weights. For each batch it is the workers' mean number of tokens
over the largest one, assuming equal cost of all tokens.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from finlora.config import DataConfig, ModelConfig, RunConfig
from finlora.train.run.run_folder import load_training_set
from finlora.train.steps.sampler import Sampler

Deal = Callable[[Sampler, Sequence[int]], list[list[int]]]
DEALS: dict[str, Deal] = {
    "in turn": lambda sampler, batch: [
        list(batch[worker :: sampler.world_size]) for worker in range(sampler.world_size)
    ],
    "by length": lambda sampler, batch: sampler.shares(batch),
}


def measure(lengths: Sequence[int], workers: int, batch_size: int, num_batches: int, deal: Deal) -> float:
    """Return the mean share over batches."""
    sampler = Sampler(lengths=lengths, global_batch_size=batch_size, world_size=workers, seed=0)
    shares = []
    for batch in sampler.batches(num_batches):
        tokens = [sum(lengths[index] for index in own) for own in deal(sampler, batch)]
        shares.append(statistics.fmean(tokens) / max(tokens))
    return statistics.fmean(shares)


def main() -> None:
    """Print a line for each task and way of sharing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared tasks")
    parser.add_argument(
        "--base", type=Path, required=True, help="folder with config.json, and a tokenizer or --tokenizer"
    )
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--tasks", nargs="+", required=True)
    parser.add_argument("--workers", nargs="+", metavar="WORKERS:BATCH", default=["4:16", "4:64", "16:256", "64:1024"])
    parser.add_argument("--batches", type=int, default=200)
    options = parser.parse_args()
    print(f"{'task':20} {'shared':10}" + "".join(f"{split:>10}" for split in options.workers))
    for task in options.tasks:
        config = RunConfig(
            model=ModelConfig(
                base=str(options.base), tokenizer=options.tokenizer and str(options.tokenizer), weights="random"
            ),
            data=DataConfig(tasks=(task,), dir=str(options.data)),
        )
        lengths = [item.num_tokens for item in load_training_set(config).encoded]
        for name, deal in DEALS.items():
            cells = []
            for split in options.workers:
                workers, _, batch_size = split.partition(":")
                cells.append(measure(lengths, int(workers), int(batch_size), options.batches, deal))
            print(f"{task:20} {name:10}" + "".join(f"{cell:10.0%}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
