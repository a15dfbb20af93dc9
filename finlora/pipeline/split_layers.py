"""Split of decoder layers into stages of about equal time.

A pass of few tokens reads every weight once, so a stage's time is proportional to its weights' bytes: its layers, and the output
head at the last stage. The embedding is looked up, not multiplied, and takes no time.
"""

from __future__ import annotations

from finlora.config import Bits
from finlora.errors import ConfigError
from finlora.formula.llama import LlamaShape
from finlora.model.memory.fixed_memory import count_weight_bytes


def split_layers(shape: LlamaShape, bits: Bits, num_stages: int) -> list[range]:
    """Return the decoder layers of each stage that make the slowest stage fastest.

    Raises:
        ConfigError: more stages than layers, or none.
    """
    if not 1 <= num_stages <= shape.num_layers:
        raise ConfigError(
            f"found {num_stages} stages for {shape.num_layers} decoder layers: expected 1 to {shape.num_layers}, one layer each."
        )
    table = 2 * shape.vocab_size * shape.hidden_size
    tables = table if shape.is_tied else 2 * table
    layer = (count_weight_bytes(shape, bits) - tables) / shape.num_layers
    # The last stage also has the head, so it gets fewer layers; a remainder goes to the first stages.
    best: list[int] = []
    slowest = float("inf")
    for last in range(1, shape.num_layers - num_stages + 2):
        rest = shape.num_layers - last
        sizes = [last]
        if num_stages > 1:
            share, more = divmod(rest, num_stages - 1)
            sizes = [share + (number < more) for number in range(num_stages - 1)] + [last]
        elif rest:
            continue
        time = max([*(size * layer for size in sizes[:-1]), last * layer + table])
        if time <= slowest:
            best, slowest = sizes, time
    spans, start = [], 0
    for size in best:
        spans.append(range(start, start + size))
        start += size
    return spans
