"""A span of decoder layers with its part of the KV cache, for inference: one stage of the pipeline, or the whole model.

Shapes: T rows of a micro-batch, R rows of the cache, H hidden, g key-value heads of width d, N wanted rows, V vocabulary.

finlora/model/layers/packed_layer.py writes the same layer out for training: its kernels keep what a backward pass needs, and its
queries meet the rows of a pack instead of a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finlora.engine.micro_batch import MicroBatch
from finlora.errors import AdapterError
from finlora.formula.llama import PRODUCTS, Product, product_width, shape_of
from finlora.grammar.vocabulary import Vocabulary
from finlora.model.kernels import launch
from finlora.model.layers.attention import can_attend_alone, can_flash
from finlora.model.layers.cached_attention import attend_cache, attend_tails, write_cache
from finlora.model.layers.elementwise import gate, normalise, normalise_heads
from finlora.model.layers.frozen_linear import MAX_FEW_ROWS, FrozenWeight, multiply_gated, split_bias
from finlora.model.layers.frozen_model import ModelEnds, read_layer
from finlora.model.memory.peak import measure_peak_gib
from finlora.stage.adapter_weights import Adapter, Bank, read_adapter
from finlora.stage.batch_attention import Attend, make_attention, narrow
from finlora.stage.decode_graphs import Begin, Rows, StageGraphs
from finlora.stage.grammar_masks import GrammarMasks
from finlora.stage.row_padding import compiles_by_rows, count_padding, pad_adapters, repeat_last
from finlora.stage.sampling import Unread, choice_log_probs, list_top, sample
from finlora.stage.upload import fill_sampled, upload


@dataclass(frozen=True, slots=True)
class _Adapt:
    """Functions that add the adapters' updates to the products of a pass."""

    add: Callable[[Tensor, Tensor, int, Product], Tensor]
    """(product, its input, index of the layer in the span, product's name) -> product with the updates."""
    touches: Callable[[int, Product], bool]
    """(index of the layer in the span, product's name) -> whether there are updates."""
    has_gains: Callable[[int, Product], bool]
    """The same -> whether an update scales the base's product, as DoRA does."""
    scale: Callable[[Tensor, int, Product], Tensor]
    """(base's product without bias, index, product's name) -> scaled product."""

    def multiply(
        self, weight: FrozenWeight, x: Tensor, index: int, product: Product, residual: Tensor | None = None
    ) -> Tensor:
        """Return a product of the base with the updates (+ residual). Shapes: (T, K) -> (T, N)."""
        if not self.has_gains(index, product):
            return self.add(weight.forward(x, residual), x, index, product)
        bare, bias = split_bias(weight)
        out = self.scale(bare.forward(x), index, product)
        for term in (bias, residual):
            out = out if term is None else out + term
        return self.add(out, x, index, product)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Rows whose last hidden states are wanted. In the last layer other rows only write their keys and values."""

    rows: Tensor
    attend_keys: Attend
    adapt: _Adapt


class Stage:
    """Runs micro-batches through its layers, in the order of the calls.

    Args:
        net: transformers' model with the span's parameters (`load_base`); consumed.
        span: decoder layers of the stage.
        num_rows: R.
        dtype: type of activations and cache.
        keep_unpacked: hold a 4-bit base unpacked: four times the memory, and no unpacking at each product.
        vocabulary: of the base, for requests with a grammar. None: there are none.
    """

    def __init__(
        self,
        net: Any,
        span: range,
        num_rows: int,
        dtype: torch.dtype,
        *,
        keep_unpacked: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.shape, self.span, self.dtype = shape_of(net.config.to_dict()), span, dtype
        self._ends = ModelEnds(net, self.shape, dtype)
        self.layers = []
        for index in span:
            self.layers.append(
                read_layer(net.model.layers[index], index, self.shape, dtype, keep_unpacked, consumes=True)
            )
            # Free the memory of the original weights: no later allocation would reuse it, and other processes may share the GPU.
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        self._has_unrotated = not all(layer.is_rotated for layer in self.layers)
        self.device = self.layers[0].first_norm.device
        self.is_first, self.is_last = span.start == 0, span.stop == self.shape.num_layers
        self.adapters: dict[str, Adapter] = {}
        self.bank = Bank()
        _, num_groups, width = self.layers[0].heads
        # One row more, for the padding rows of captured passes.
        self.cache = torch.zeros(len(span), 2, num_rows + 1, num_groups, width, dtype=dtype, device=self.device)
        # The cache has the type and head width of the queries.
        self._flashes, self._goes_alone = can_flash(self.cache), can_attend_alone(self.cache)
        self._pads = compiles_by_rows(self.device, dtype)
        self.passes = StageGraphs(self._run_rows, num_rows, self.device, fills=self._flashes)
        self._masks = GrammarMasks(vocabulary, self.device)

    @property
    def cache_bytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()

    def peak_memory_gib(self) -> float:
        """Return the peak memory of the stage's process in GiB, loading included."""
        return measure_peak_gib(self.device)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Read an adapter's updates for this span.

        Raises:
            AdapterError: the folder holds no adapter of this base, or memory is too small; the stage is unchanged.
        """

        def read_weight(layer: int, product: Product) -> Tensor:
            weight: FrozenWeight = getattr(self.layers[layer - self.span.start], product)
            return weight.dense()

        adapter = read_adapter(folder, self.shape, self.span, self.dtype, self.device, read_weight)
        sizes = {product: product_width(product, self.shape) for product in PRODUCTS}
        try:
            has_moved = self.bank.add(name, adapter, sizes)
        except torch.OutOfMemoryError as error:
            self.bank.remove(name)
            self.passes.forget()  # some tensors may have moved
            raise AdapterError(
                f"{folder} does not fit into the memory that is left on {self.device} ({error}): hold fewer adapters at once "
                "(max_adapters), or a smaller KV cache."
            ) from error
        if has_moved:
            self.passes.forget()
        self.adapters[name] = adapter

    def unload_adapter(self, name: str) -> None:
        """Drop an adapter, if the stage has it."""
        if self.adapters.pop(name, None) is not None:
            self.bank.remove(name)

    def forget_requests(self) -> None:
        """Drop all matchers, and set every cache row to zero, in place: CUDA graphs write there."""
        self.cache.zero_()
        self._masks.clear()

    @torch.inference_mode()
    def run(self, batch: MicroBatch, hidden: Tensor | None, begin: Begin = lambda: None) -> Tensor | Unread:
        """Compute a micro-batch.

        Args:
            hidden: (T, H) from the stage before; None at the first stage.

        Returns:
            Hidden states (T, H) for the next stage; from the last stage, sampled tokens and log-probabilities.
        """
        self._copy_rows(batch)
        wanted = None
        if self.is_last:
            wanted = sorted({sample.row for sample in batch.samples} | {score.row for score in batch.scores})
        taken = self.passes.take(batch)
        if taken is None:
            result = self.forward(batch, hidden, wanted, begin())
        else:
            result = self.passes.run(batch, taken, hidden, self.bank.numbers, begin)
        if wanted is None:
            return result
        if not wanted:
            return self._finish(batch, (), result.new_empty(0, 1).float())
        if taken is not None and taken.form.is_decode:
            return self._finish(batch, range(batch.num_rows), result)
        states = result if taken is None else result[self._ids(wanted)]
        return self._finish(batch, wanted, self.compute_logits(states))

    @torch.inference_mode()
    def forward(
        self,
        batch: MicroBatch,
        hidden: Tensor | None,
        wanted: Sequence[int] | None = None,
        sampled: Tensor | None = None,
    ) -> Tensor:
        """Return the hidden states (T, H) after the span's last layer, and fill the cache.

        Args:
            wanted: rows, ascending, whose states (N, H) are returned; None: all.
            sampled: tokens of the micro-batch that this one follows.
        """
        ids, positions, slots = (self._ids(numbers) for numbers in (batch.input_ids, batch.positions, batch.slots))
        if sampled is not None:
            fill_sampled(ids, sampled)
        own, padding = batch.adapters, self._count_padding(batch.num_rows)
        if padding:
            ids, positions = repeat_last(ids, padding), repeat_last(positions, padding)
            slots = torch.nn.functional.pad(slots, (0, padding), value=self.cache.shape[2] - 1)
            hidden, own = None if hidden is None else repeat_last(hidden, padding), pad_adapters(own, padding)
        few = None
        if wanted is not None:
            few_padding = self._count_padding(len(wanted))
            segments, adapters = narrow(batch, wanted)
            attend_few = make_attention(segments, self.device, num_padding=few_padding, flashes=self._flashes)
            if few_padding:
                adapters = pad_adapters(adapters, few_padding)
            few = _Wanted(repeat_last(self._ids(wanted), few_padding), attend_few, self._make_adapt(adapters))
        attend_keys = make_attention(
            batch.segments, self.device, num_padding=padding, flashes=self._flashes, goes_alone=self._goes_alone
        )
        result = self._run_layers(ids, positions, slots, hidden, attend_keys, self._make_adapt(own), few)
        return result[: batch.num_rows if wanted is None else len(wanted)]

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits. Shapes: (N, H) -> (N, V)."""
        norm, eps, head = self._ends.output_weights()
        rows = repeat_last(hidden, self._count_padding(len(hidden)))
        return (self._norm(rows, norm, eps) @ head.t())[: len(hidden)].float()

    def _count_padding(self, num_rows: int) -> int:
        return count_padding(num_rows) if self._pads and not self._flashes else 0

    def _run_rows(self, rows: Rows, hidden: Tensor | None) -> Tensor:
        """Compute a pass that can be captured; returns hidden states, or logits where the last stage decodes."""
        form = rows.form

        def attend_keys(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            output, _ = attend_cache(query, keys, values, rows.ranges)
            return attend_tails(output, query, keys, values, rows.tails) if form.num_tails else output

        def add(out: Tensor, x: Tensor, index: int, product: Product) -> Tensor:
            return self.bank.apply(out, x, rows.adapters, self.span[index], product) if form.has_adapters else out

        def touches(index: int, product: Product) -> bool:
            return form.has_adapters and self.bank.touches(self.span[index], product)

        def has_gains(index: int, product: Product) -> bool:
            return form.has_adapters and self.bank.has_gains(self.span[index], product)

        def scale(out: Tensor, index: int, product: Product) -> Tensor:
            return self.bank.scale(out, rows.adapters, self.span[index], product)

        adapt = _Adapt(add, touches, has_gains, scale)
        x = self._run_layers(rows.ids, rows.positions, rows.slots, hidden, attend_keys, adapt)
        return self.compute_logits(x) if self.is_last and form.is_decode else x

    def _norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        if launch.takes_kernels(x) and len(x) <= MAX_FEW_ROWS:
            from finlora.model.kernels.rms_norm import norm_rows

            return norm_rows(x, weight, eps)
        return normalise(x, weight, eps)

    def _copy_rows(self, batch: MicroBatch) -> None:
        """Copy the cache rows of shared prefixes, all at once."""
        if not batch.copies:
            return
        origins: dict[int, int] = {}  # target -> source: each copy reads what the copies before it have written
        for source, target, count in batch.copies:
            read = [origins.get(row, row) for row in range(source, source + count)]
            origins.update(zip(range(target, target + count), read, strict=True))
        targets, sources = self._ids([*origins]), self._ids([*origins.values()])
        # One layer's keys, then its values, and so on: there, index_copy_ copies whole rows, which is many times faster.
        for rows in self.cache.flatten(0, 1):
            rows.index_copy_(0, targets, rows.index_select(0, sources))

    def _run_layers(
        self,
        ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        hidden: Tensor | None,
        attend_keys: Attend,
        adapt: _Adapt,
        wanted: _Wanted | None = None,
    ) -> Tensor:
        if self.is_first:
            hidden = self._ends.embed(ids)
        assert hidden is not None, "stages after the first get hidden states"
        x = hidden.to(self.device)
        tables = self._ends.rotary_tables(x, positions)
        unturned = self._ends.unrotated_tables(tables[0]) if self._has_unrotated else tables
        for index, layer in enumerate(self.layers):
            *_, width = layer.heads
            normed = self._norm(x, layer.first_norm, layer.eps)
            qkv = adapt.multiply(layer.qkv, normed, index, "qkv").view(len(x), -1, width)
            if layer.head_norms is not None:
                normalise_heads(qkv, layer.head_norms, layer.eps)
            keys, values = self.cache[index]
            query = write_cache(qkv, *(tables if layer.is_rotated else unturned), slots, keys, values)
            if wanted is not None and index == len(self.layers) - 1:
                x, query, attend_keys, adapt = x[wanted.rows], query[wanted.rows], wanted.attend_keys, wanted.adapt
                if not len(x):
                    break
            attended = attend_keys(query, keys, values).flatten(1)
            y = adapt.multiply(layer.out, attended, index, "out", x)
            normed = self._norm(y, layer.second_norm, layer.eps)
            if adapt.touches(index, "gate_up"):
                inner = gate(adapt.multiply(layer.gate_up, normed, index, "gate_up"))
            else:
                inner = multiply_gated(layer.gate_up, normed)
            x = adapt.multiply(layer.down, inner, index, "down", y)
        return x

    def _make_adapt(self, adapters: Sequence[tuple[str | None, int]]) -> _Adapt:
        """Return functions that add each adapter's updates to its own rows of a product, in place.

        Args:
            adapters: (name, number of rows) in the order of the rows.
        """

        def add(out: Tensor, x: Tensor, index: int, product: Product) -> Tensor:
            start = 0
            for name, num_rows in adapters:
                rows = slice(start, start + num_rows)
                start += num_rows
                if name is None or not num_rows:
                    continue
                for update in self.adapters[name].get((self.span[index], product), ()):
                    out[rows, update.columns].addmm_(x[rows] @ update.down.t(), update.up.t(), alpha=update.scale)
            return out

        def touches(index: int, product: Product) -> bool:
            return any(name is not None and (self.span[index], product) in self.adapters[name] for name, _ in adapters)

        def has_gains(index: int, product: Product) -> bool:
            names = (name for name, _ in adapters if name is not None)
            updates = (update for name in names for update in self.adapters[name].get((self.span[index], product), ()))
            return any(update.gain is not None for update in updates)

        def scale(out: Tensor, index: int, product: Product) -> Tensor:
            start = 0
            for name, num_rows in adapters:
                rows = slice(start, start + num_rows)
                start += num_rows
                for update in () if name is None else self.adapters[name].get((self.span[index], product), ()):
                    if update.gain is not None:
                        own = out[rows, update.columns]
                        own.addcmul_(own, update.gain)
            return out

        return _Adapt(add, touches, has_gains, scale)

    def _finish(self, batch: MicroBatch, rows: Sequence[int], logits: Tensor) -> Unread:
        """Sample and score from the logits (N, V) of some rows of the micro-batch."""
        indices = {row: index for index, row in enumerate(rows)}
        sampled = logits[self._ids([indices[sample.row] for sample in batch.samples])] if batch.samples else logits[:0]
        scored = logits[self._ids([indices[score.row] for score in batch.scores])] if batch.scores else logits[:0]
        targets = self._ids([score.token for score in batch.scores])
        # Here a GPU has the pass in its queue, and computes it while the host computes the masks.
        masks = self._masks.fill(batch)
        faults = masks.faults if masks else ()
        tokens, log_probs = sample(sampled, batch.samples, masks)
        tops = list_top(sampled, batch.samples)
        unread = Unread(batch.number, tokens, log_probs, choice_log_probs(scored, targets), tops, faults)
        self._masks.follow(batch, unread.read)
        return unread

    def _ids(self, numbers: Sequence[int]) -> Tensor:
        return upload(numbers, self.device)
