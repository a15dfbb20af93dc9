"""CUDA graphs of a stage's passes of few rows: hundreds of launches become one replay.

Up to two thousand rows the GPU computes a pass faster than the host launches it. A graph is valid for one `Form`, so rows and
segments are padded to the next of the sizes below. The first pass of a form runs eagerly, which compiles its kernels; the second
is captured, and later ones are replayed. Without FlashAttention, as on CPU, nothing is captured and nothing padded.

Padding rows write to a cache row of their own. They repeat rows of the pass, since the outliers of all rows together decide which
columns an int8 product holds back: other rows would change the result. Where each row is a segment, no product does that
(finlora/model/layers/frozen_linear.py, MAX_FEW_ROWS), and padding rows see one key instead of many.

Shapes: T rows, B segments, H hidden. Source: https://docs.pytorch.org/docs/2.11/notes/cuda.html#cuda-graphs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, cycle
from typing import NamedTuple

import torch
from torch import Tensor

from finlora.engine.micro_batch import MicroBatch, Segment
from finlora.model.kernels import launch
from finlora.model.layers.cached_attention import KeyRanges, Tails
from finlora.stage.batch_attention import Tail, group_tails, list_rows, split_tails
from finlora.stage.upload import fill_sampled, pin, upload

DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64)
"""Rows of passes in which each row is a segment."""
PROMPT_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
"""Rows of all other captured passes; larger ones run eagerly."""
PART_SIZES = ((4, 0), (64, 0), (128, 0), (24, 16), (96, 256))
"""(segments, rows with a second range of keys) of captured passes. Attention starts a program for each, also for empty ones.

A size without such rows is for passes without them alone. One with them needs at least one such row, which the padding repeats.
128 segments hold the next tokens of 65 to 128 requests, padded to 128 rows.
"""
_MOST_KEYS = 8
"""Most keys in the second range of a captured pass."""
SHORT = 128
"""Queries that one program of FlashAttention computes. Many segments of at most so many queries get a program each."""
FEW_SEGMENTS, FEW_TAILS = PART_SIZES[-2]

Run = Callable[["Rows", Tensor | None], Tensor]
Begin = Callable[[], Tensor | None]
"""Called when the host has laid out a micro-batch, before its hidden states are read. Returns the sampled tokens (N,) of the
micro-batch that it follows; None where it follows none."""


@dataclass(frozen=True, slots=True)
class Form:
    """Sizes and kind of the passes that a graph is valid for."""

    num_rows: int
    num_segments: int
    num_tails: int
    """Rows with a second range of keys."""
    max_queries: int
    is_decode: bool
    """Each row is a segment: a request's next token."""
    has_adapters: bool
    """False: the pass is captured without the adapters' products."""

    @property
    def num_groups(self) -> int:
        """Upper bound of runs of tails that share their first range, and one for padding."""
        return self.num_segments if self.num_tails else 0


class Taken(NamedTuple):
    """A micro-batch that fits a form."""

    form: Form
    segments: Sequence[Segment]
    """With one range of keys each."""
    tails: Sequence[Tail]
    """Rows with a second range of keys."""
    filling: Sequence[tuple[int, Segment]]
    """Padding segments, each with the first of the rows that it repeats."""


class Rows:
    """Device tensors that describe the rows of a pass; a graph reads them at each replay.

    Args:
        numbers: (4 T + 3 B + 3 C + 3 B,) int64: token id, position, cache row and adapter number of each row; last row + 1, first
            key row and number of keys of each segment; for C rows with a second range of keys, if any, the row, the range's first
            key row and number of keys, and the segments of their first ranges.
    """

    def __init__(self, numbers: Tensor, form: Form) -> None:
        self.form = form
        sizes = (4 * form.num_rows, 3 * form.num_segments, 3 * form.num_tails, 3 * form.num_groups)
        rows, segments, tails, groups = numbers.split(sizes)
        self.ids, self.positions, self.slots, self.adapters = rows.view(4, -1)
        self.ranges = _to_ranges(segments.view(3, -1), form.max_queries)
        tail_rows, starts, counts = tails.view(3, -1)
        self.tails = Tails(tail_rows, _to_ranges(groups.view(3, -1), form.num_tails), starts, counts, _MOST_KEYS)


def _to_ranges(numbers: Tensor, max_queries: int) -> KeyRanges:
    ends, starts, lengths = numbers.int()
    pad = torch.nn.functional.pad
    return KeyRanges(pad(ends, (1, 0)), pad(starts, (0, 1)), lengths, max_queries)


def is_decode(batch: MicroBatch) -> bool:
    """Return whether every row of a micro-batch is a request's next token with one range of keys."""
    return batch.num_rows <= DECODE_SIZES[-1] and all(
        segment.num_rows == 1 and len(segment.keys) == 1 for segment in batch.segments
    )


class StageGraphs:
    """Runs micro-batches of few rows, by CUDA graphs on a GPU.

    Args:
        run: computes rows, from hidden states (T, H) where the stage is not the first.
        spare_row: cache row that belongs to no request.
        fills: whether passes are padded to the sizes of forms, as captured ones must be.

    Attributes:
        captures: whether a form is captured at its second pass, as on a GPU.
    """

    def __init__(self, run: Run, spare_row: int, device: torch.device, *, fills: bool) -> None:
        self._run, self._spare_row, self._device, self.fills = run, spare_row, device, fills
        self.captures = device.type == "cuda"
        self._graphs: dict[Form, _Graph] = {}
        self._seen: set[Form] = set()
        self._pool: torch.cuda.MemPool | None = None

    def forget(self) -> None:
        """Drop all graphs, since tensors that they read have moved."""
        self._graphs.clear()

    def take(self, batch: MicroBatch) -> Taken | None:
        """Return the form and padding of a micro-batch; None where no form fits, or passes are not padded."""
        count = batch.num_rows
        if not (self.fills and count):
            return None
        has_adapters = any(name is not None for name, _ in batch.adapters)
        if is_decode(batch):
            size = _find(DECODE_SIZES, count)
            assert size is not None
            alone = Segment(1, ((self._spare_row, 1),))
            return Taken(Form(size, size, 0, 1, True, has_adapters), batch.segments, (), [(0, alone)] * (size - count))
        size = _find(PROMPT_SIZES, count)
        if size is None:
            return None
        filling = _repeat(batch.segments, size - count)
        segments, tails = split_tails(batch.segments)
        if filling is None or any(tail.num_keys > _MOST_KEYS for tail in tails):
            return None
        # Tails need one group more, for their padding.
        num_segments = len(segments) + max(len(filling), bool(tails))
        most = find_parts(num_segments, sum(tail.num_rows for tail in tails))
        if most is None:
            return None
        is_short = most[0] > FEW_SEGMENTS and max(segment.num_rows for segment in segments) <= SHORT
        max_queries = min(size, SHORT) if is_short else size
        return Taken(Form(size, *most, max_queries, False, has_adapters), segments, tails, filling)

    def run(
        self,
        batch: MicroBatch,
        taken: Taken,
        hidden: Tensor | None,
        adapters: Mapping[str | None, int],
        begin: Begin = lambda: None,
    ) -> Tensor:
        """Return the result of the micro-batch's rows, valid until the next call.

        Args:
            taken: result of `take`.
            hidden: (rows, H) from the stage before; None at the first stage.
            adapters: number of each adapter.
        """
        form = taken.form
        sources = [row for first, segment in taken.filling for row in range(first, first + segment.num_rows)]
        numbers = self._lay_out(batch, taken, sources, adapters)
        sampled = begin()
        if hidden is not None:
            hidden = hidden.to(self._device)
            hidden = torch.cat([hidden, hidden[upload(sources, self._device)]]) if sources else hidden
        if self.captures and (form in self._graphs or form in self._seen):
            if form not in self._graphs:
                self._pool = self._pool or torch.cuda.MemPool()
                self._graphs[form] = _Graph(self._run, numbers, hidden, form, self._device, self._pool)
            return self._graphs[form].replay(numbers, hidden, sampled)[: batch.num_rows]
        self._seen.add(form)
        rows = Rows(numbers.to(self._device, non_blocking=True), form)
        if sampled is not None:
            fill_sampled(rows.ids, sampled)
        return self._run(rows, hidden)[: batch.num_rows]

    def _lay_out(
        self, batch: MicroBatch, taken: Taken, sources: Sequence[int], adapters: Mapping[str | None, int]
    ) -> Tensor:
        """Return the argument of `Rows`.

        Args:
            sources: rows that the padding rows repeat.
        """
        form = taken.form
        names = [adapters[name] for name, rows in batch.adapters for _ in range(rows)]
        ids, positions, names = (
            [*numbers, *(numbers[row] for row in sources)] for numbers in (batch.input_ids, batch.positions, names)
        )
        slots = [*batch.slots, *[self._spare_row] * len(sources)]
        segments = (*taken.segments, *(segment for _, segment in taken.filling))
        parts = [(segment.num_rows, *segment.keys[0]) for segment in segments]
        tails = [(row, start, count) for tail in taken.tails for row, start, count in list_rows(tail)]
        groups = group_tails(taken.tails)
        if missing := form.num_tails - len(tails):  # padded with the first of them: there is one (find_parts)
            tails += tails[:1] * missing
            groups.append((missing, *taken.tails[0].first))
        columns = (number for column in zip(*tails, strict=True) for number in column)
        ranges = (*self._pad(parts, form.num_segments), *columns, *self._pad(groups, form.num_groups))
        return pin([*ids, *positions, *slots, *names, *ranges], self._device)

    def _pad(self, parts: Sequence[tuple[int, int, int]], count: int) -> list[int]:
        """Return ends, first key rows and numbers of keys of `count` segments, the last ones empty."""
        empty = count - len(parts)
        ends = list(accumulate(num_rows for num_rows, _, _ in parts))
        ends += ends[-1:] * empty
        starts = [start for _, start, _ in parts] + [self._spare_row] * empty
        return [*ends, *starts, *(num_keys for _, _, num_keys in parts), *[1] * empty]


def _find(sizes: Sequence[int], least: int) -> int | None:
    return next((size for size in sizes if size >= least), None)


def find_parts(num_segments: int, num_tails: int) -> tuple[int, int] | None:
    """Return the smallest of PART_SIZES for a pass; None where it has too many segments or tails."""
    for segments, tails in PART_SIZES:
        if num_segments <= segments and num_tails <= tails and (num_tails > 0) == (tails > 0):
            return segments, tails
    return None


def _repeat(segments: Sequence[Segment], missing: int) -> list[tuple[int, Segment]] | None:
    """Return first row and leading part of segments, longest first, with `missing` rows in all.

    None where rows are missing and no segment has a single range of keys: none can be repeated.
    """
    firsts = accumulate((segment.num_rows for segment in segments), initial=0)
    candidates = [pair for pair in zip(firsts, segments, strict=False) if len(pair[1].keys) == 1]
    if missing and not candidates:
        return None
    pieces = []
    for first, segment in cycle(sorted(candidates, key=lambda pair: -pair[1].num_rows)):
        if not missing:
            break
        count = min(missing, segment.num_rows)
        start, num_keys = segment.keys[0]
        pieces.append((first, Segment(count, ((start, num_keys - segment.num_rows + count),))))
        missing -= count
    return pieces


class _Graph:
    """A captured pass and the memory of its inputs."""

    def __init__(
        self,
        run: Run,
        numbers: Tensor,
        hidden: Tensor | None,
        form: Form,
        device: torch.device,
        pool: torch.cuda.MemPool,
    ) -> None:
        self.numbers = numbers.to(device)
        self._ids = self.numbers[: form.num_rows]
        self.hidden = None if hidden is None else hidden.clone()
        torch.cuda.synchronize(device)
        self.graph = torch.cuda.CUDAGraph()
        with launch.capture_graph(self.graph, pool):
            self.output = run(Rows(self.numbers, form), self.hidden)

    def replay(self, numbers: Tensor, hidden: Tensor | None, sampled: Tensor | None) -> Tensor:
        self.numbers.copy_(numbers, non_blocking=True)
        if sampled is not None:
            fill_sampled(self._ids, sampled)
        if self.hidden is not None and hidden is not None:
            self.hidden.copy_(hidden)
        self.graph.replay()
        return self.output
