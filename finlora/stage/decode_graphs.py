"""Passes of few rows, recorded as CUDA graphs: hundreds of launches become one.

Up to two thousand rows the GPU has computed a pass sooner than the host has launched it. A graph holds for one `Form`, so rows
and segments are filled up to the next of the sizes below. A form runs as it is at first, which compiles its kernels, is recorded
when it comes again and replayed from then on. Without FlashAttention, as on CPU, nothing is recorded and nothing filled up.

Rows that fill up a pass write to a cache row of their own. They repeat rows of the pass, since the outliers of all rows together
say which columns an int8 product holds back: others would change the result. Where each row is a segment, no product does that
(finlora/model/layers/frozen_linear.py, MAX_FEW_ROWS), and they see one key instead of many.

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
from finlora.model.layers.cached_attention import Places, Tails
from finlora.stage.batch_attention import Tail, group_tails, list_rows, split_tails
from finlora.stage.upload import fill_drawn, pin, upload

DECODE_SIZES = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64)
"""Rows of passes in which each row is a segment."""
PROMPT_SIZES = (16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 2048)
"""Rows of all other recorded passes; larger ones run as they are."""
PART_SIZES = ((4, 0), (64, 0), (128, 0), (24, 16), (96, 256))
"""Most segments and most rows with keys in a second range: attention starts a program for each, also for empty ones.

A size without such rows takes only passes without them, one with them only passes that have at least one: the first of them is
what the others repeat. 128 segments hold the next tokens of 65 to 128 requests, padded to 128 rows.
"""
_MOST_KEYS = 8
"""Keys in a second place that a recorded pass takes."""
SHORT = 128
"""Queries that a program of FlashAttention takes: of more than a few segments with no more each, it starts one for each."""
FEW_SEGMENTS, FEW_TAILS = PART_SIZES[-2]

Run = Callable[["Rows", Tensor | None], Tensor]
Begin = Callable[[], Tensor | None]
"""Called when the host has laid out a micro-batch; hidden states need not be there before. Returns the tokens (N,) that the
micro-batch follows, None where it follows none."""


@dataclass(frozen=True, slots=True)
class Form:
    """What a graph holds for."""

    num_rows: int
    num_segments: int
    num_tails: int
    """Rows with keys in a second place."""
    max_queries: int
    is_decode: bool
    """Each row is a segment: a request's next token."""
    has_adapters: bool
    """Without an adapter in it, a pass is recorded without their products."""

    @property
    def num_groups(self) -> int:
        """Rows with keys in a second place that follow each other and share those of the first, one group to spare."""
        return self.num_segments if self.num_tails else 0


class Taken(NamedTuple):
    """A micro-batch that can be recorded."""

    form: Form
    segments: Sequence[Segment]
    """With keys in one place each."""
    tails: Sequence[Tail]
    """What rows see in a second one."""
    filling: Sequence[tuple[int, Segment]]
    """Segments that fill it up, with the rows that their first ones repeat."""


class Rows:
    """Where the rows of a pass stand: tensors that a graph reads again each time.

    Args:
        numbers: (4 T + 3 B + 3 C + 3 B,) int64: each row's id, position, cache row and adapter's number; each segment's end in
            the rows, first key row and number of keys; of C rows with keys in a second place, if any, the row, its first key row
            there and number of keys, and of their keys in the first place the segments.
    """

    def __init__(self, numbers: Tensor, form: Form) -> None:
        self.form = form
        sizes = (4 * form.num_rows, 3 * form.num_segments, 3 * form.num_tails, 3 * form.num_groups)
        rows, segments, tails, groups = numbers.split(sizes)
        self.ids, self.positions, self.slots, self.adapters = rows.view(4, -1)
        self.places = _to_places(segments.view(3, -1), form.max_queries)
        tail_rows, starts, counts = tails.view(3, -1)
        self.tails = Tails(tail_rows, _to_places(groups.view(3, -1), form.num_tails), starts, counts, _MOST_KEYS)


def _to_places(numbers: Tensor, max_queries: int) -> Places:
    ends, starts, lengths = numbers.int()
    pad = torch.nn.functional.pad
    return Places(pad(ends, (1, 0)), pad(starts, (0, 1)), lengths, max_queries)


def is_decode(batch: MicroBatch) -> bool:
    """Return whether every row of a micro-batch is a request's next token, whose keys lie side by side."""
    return batch.num_rows <= DECODE_SIZES[-1] and all(
        segment.num_rows == 1 and len(segment.keys) == 1 for segment in batch.segments
    )


class RecordedPasses:
    """Runs micro-batches of few rows.

    Args:
        run: computes rows, from hidden states (T, H) where the stage is not the first.
        spare_row: cache row that belongs to no request.
        fills: whether passes are filled up to their sizes, as recorded ones must be.

    Attributes:
        records: a form that comes again is recorded, as on a GPU.
    """

    def __init__(self, run: Run, spare_row: int, device: torch.device, *, fills: bool) -> None:
        self._run, self._spare_row, self._device, self.fills = run, spare_row, device, fills
        self.records = device.type == "cuda"
        self._graphs: dict[Form, _Graph] = {}
        self._seen: set[Form] = set()
        self._pool: torch.cuda.MemPool | None = None

    def forget(self) -> None:
        """Drop what is recorded, since tensors that it reads have moved."""
        self._graphs.clear()

    def take(self, batch: MicroBatch) -> Taken | None:
        """Return how a micro-batch is recorded; None where it has no size, or passes are not filled up."""
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
        # Of tails one group more: rows that fill them up.
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
        """Return the result of the micro-batch's rows; it holds until the next call.

        Args:
            taken: what `take` returned.
            hidden: (rows, H) from the stage before; None at the first stage.
            adapters: their numbers.
            begin: called when all is laid out, before `hidden` is read; returns the tokens that the micro-batch follows.
        """
        form = taken.form
        sources = [row for first, segment in taken.filling for row in range(first, first + segment.num_rows)]
        numbers = self._lay_out(batch, taken, sources, adapters)
        drawn = begin()
        if hidden is not None:
            hidden = hidden.to(self._device)
            hidden = torch.cat([hidden, hidden[upload(sources, self._device)]]) if sources else hidden
        if self.records and (form in self._graphs or form in self._seen):
            if form not in self._graphs:
                self._pool = self._pool or torch.cuda.MemPool()
                self._graphs[form] = _Graph(self._run, numbers, hidden, form, self._device, self._pool)
            return self._graphs[form].replay(numbers, hidden, drawn)[: batch.num_rows]
        self._seen.add(form)
        rows = Rows(numbers.to(self._device, non_blocking=True), form)
        if drawn is not None:
            fill_drawn(rows.ids, drawn)
        return self._run(rows, hidden)[: batch.num_rows]

    def _lay_out(
        self, batch: MicroBatch, taken: Taken, sources: Sequence[int], adapters: Mapping[str | None, int]
    ) -> Tensor:
        """Return what `Rows` takes.

        Args:
            sources: rows that the filling ones repeat.
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
        if missing := form.num_tails - len(tails):  # the first of these rows fills them up: there is one (find_parts)
            tails += tails[:1] * missing
            groups.append((missing, *taken.tails[0].first))
        columns = (number for column in zip(*tails, strict=True) for number in column)
        places = (*self._pad(parts, form.num_segments), *columns, *self._pad(groups, form.num_groups))
        return pin([*ids, *positions, *slots, *names, *places], self._device)

    def _pad(self, parts: Sequence[tuple[int, int, int]], count: int) -> list[int]:
        """Return ends, first key rows and numbers of keys of so many segments, of which the last are empty."""
        empty = count - len(parts)
        ends = list(accumulate(num_rows for num_rows, _, _ in parts))
        ends += ends[-1:] * empty
        starts = [start for _, start, _ in parts] + [self._spare_row] * empty
        return [*ends, *starts, *(num_keys for _, _, num_keys in parts), *[1] * empty]


def _find(sizes: Sequence[int], least: int) -> int | None:
    return next((size for size in sizes if size >= least), None)


def find_parts(num_segments: int, num_tails: int) -> tuple[int, int] | None:
    """Return the first of PART_SIZES that holds a pass; None where it has too many segments or tails."""
    for segments, tails in PART_SIZES:
        if num_segments <= segments and num_tails <= tails and (num_tails > 0) == (tails > 0):
            return segments, tails
    return None


def _repeat(segments: Sequence[Segment], missing: int) -> list[tuple[int, Segment]] | None:
    """Return beginnings of segments, the longest ones', that have as many rows together, with their first rows.

    None where rows are missing and no segment has its keys in one range: none can be repeated.
    """
    firsts = accumulate((segment.num_rows for segment in segments), initial=0)
    places = [place for place in zip(firsts, segments, strict=False) if len(place[1].keys) == 1]
    if missing and not places:
        return None
    pieces = []
    for first, segment in cycle(sorted(places, key=lambda place: -place[1].num_rows)):
        if not missing:
            break
        count = min(missing, segment.num_rows)
        start, num_keys = segment.keys[0]
        pieces.append((first, Segment(count, ((start, num_keys - segment.num_rows + count),))))
        missing -= count
    return pieces


class _Graph:
    """One recorded pass with the memory that its inputs are read from."""

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

    def replay(self, numbers: Tensor, hidden: Tensor | None, drawn: Tensor | None) -> Tensor:
        self.numbers.copy_(numbers, non_blocking=True)
        if drawn is not None:
            fill_drawn(self._ids, drawn)
        if self.hidden is not None and hidden is not None:
            self.hidden.copy_(hidden)
        self.graph.replay()
        return self.output
