"""Model whose next token is a hash of the adapter and of all tokens it attends to in the cache, so that a wrong row shows."""

from __future__ import annotations

import zlib

from finlora.engine.micro_batch import MicroBatch, Output
from finlora.engine.request import Request

END, VOCABULARY = 0, 40


def next_token(adapter: str | None, seen: tuple[int, ...]) -> int:
    return zlib.crc32(repr((adapter, seen)).encode()) % VOCABULARY


def log_prob(adapter: str | None, seen: tuple[int, ...], token: int) -> float:
    return -float(zlib.crc32(repr((adapter, seen, token)).encode()) % 1000)


class PretendModel:
    """Runs micro-batches on a cache of tokens."""

    def __init__(self, num_rows: int) -> None:
        self.cache: list[int | None] = [None] * num_rows
        self.sampled: dict[int, list[int]] = {}

    def run(self, batch: MicroBatch) -> Output:
        for source, target, count in batch.copies:
            self.cache[target : target + count] = self.cache[source : source + count]
        sampled = self.sampled[batch.follows] if batch.follows is not None else []
        input_ids = [token if token >= 0 else sampled[-1 - token] for token in batch.input_ids]
        assert (batch.follows is not None) == (min(batch.input_ids) < 0)
        for slot, token in zip(batch.slots, input_ids, strict=True):
            self.cache[slot] = token
        adapters = [adapter for adapter, rows in batch.adapters for _ in range(rows)]
        assert len(adapters) == batch.num_rows
        assert len(set(batch.slots)) == batch.num_rows, "two rows were written to one slot"
        seen: list[tuple[int, ...]] = []
        for segment in batch.segments:
            keys = [self.cache[row] for start, count in segment.keys for row in range(start, start + count)]
            assert None not in keys
            assert len(keys) >= segment.num_rows
            seen += [tuple(keys[: len(keys) - segment.num_rows + row + 1]) for row in range(segment.num_rows)]
        assert [tokens[-1] for tokens in seen] == input_ids
        assert [len(tokens) - 1 for tokens in seen] == batch.positions
        tokens = [
            (next_token(adapters[sample.row], seen[sample.row]), -float(sample.position)) for sample in batch.samples
        ]
        self.sampled = {batch.number: [token for token, _ in tokens]} | dict(list(self.sampled.items())[:4])
        return Output(
            batch.number,
            tokens,
            [log_prob(adapters[score.row], seen[score.row], score.token) for score in batch.scores],
        )


def answer_alone(request: Request) -> tuple[list[int], list[float]]:
    """Return the right answer of a request: its tokens, and the sums of its choices."""
    if request.choices:
        sums = []
        for choice in request.choices:
            steps = [(request.prompt_ids + choice[:index], token) for index, token in enumerate(choice)]
            sums.append(sum(log_prob(request.adapter, seen, token) for seen, token in steps))
        return [], sums
    tokens: list[int] = []
    while len(tokens) < request.sampling.max_tokens:
        token = next_token(request.adapter, (*request.prompt_ids, *tokens))
        if token == END:
            break
        tokens.append(token)
    return tokens, []
