"""Split of decoder layers into stages of about equal time.

A pass of few tokens reads every weight once, so a stage's time is proportional to its weights' bytes: its layers, and the output
head at the last stage. The embedding is looked up, not multiplied, and takes no time. A CPU has no product with packed weights:
it unpacks them for each product, so 4 and 8 bit take more time than 16 bit there, not less.
"""

from __future__ import annotations

from finlora.config import Bits
from finlora.errors import ConfigError
from finlora.formula.llama import LlamaShape
from finlora.model.memory.fixed_memory import count_weight_bytes

_UNPACKING = 2.0
"""Time of a layer at 4 or 8 bit on a CPU, in times of one at 16 bit. SmolLM2-135M at 4 bit, 1 to 8 rows, one core of a virtual
Xeon with AMX, 2026-11-30: 1.4 to 2.2 in float32, 2.7 to 3.2 in bfloat16."""


def split_layers(shape: LlamaShape, bits: Bits, num_stages: int, device: str = "cuda") -> list[range]:
    """Return the decoder layers of each stage that make the slowest stage fastest.

    Args:
        device: of all stages, `cuda` or `cpu`.

    Raises:
        ConfigError: more stages than layers, or none.
    """
    if not 1 <= num_stages <= shape.num_layers:
        raise ConfigError(
            f"found {num_stages} stages for {shape.num_layers} decoder layers: expected 1 to {shape.num_layers}, one layer each."
        )
    table = 2 * shape.vocab_size * shape.hidden_size
    tables = table if shape.is_tied else 2 * table
    read: Bits = 16 if device == "cpu" else bits
    layer = (count_weight_bytes(shape, read) - tables) / shape.num_layers
    if read != bits:
        layer *= _UNPACKING
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
