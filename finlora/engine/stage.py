"""A span of decoder layers with its part of the KV cache: one stage of the pipeline, or the whole model.

Shapes: T rows of a micro-batch, R rows of the cache, S keys that its segments see, H hidden, h heads, g key-value heads of
width d, N wanted rows, V vocabulary. For inference only: nothing is kept for a backward pass.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finlora.data.packing import Segments
from finlora.engine.adapters import Adapter, read_adapter
from finlora.engine.microbatch import MicroBatch, Output
from finlora.engine.sampling import choice_log_probs, sample
from finlora.model.attention import attend
from finlora.model.elementwise import gate, normalise, rotate
from finlora.model.packed import read_layer
from finlora.model.shapes import shape_of


class Stage:
    """Runs micro-batches through its layers, in the order in which they come.

    Args:
        net: transformers' model, of which only the span's parameters are there (`load_base`); it is taken over.
        span: its decoder layers.
        num_rows: R.
        dtype: type of activations and cache.
        keep_unpacked: hold a 4-bit base unpacked: four times the memory, and no unpacking at each product.
    """

    def __init__(
        self, net: Any, span: range, num_rows: int, dtype: torch.dtype, *, keep_unpacked: bool = False
    ) -> None:
        config = net.config
        self.net, self.span, self.dtype = net, span, dtype
        self.layers = [read_layer(net.model.layers[index], config, dtype, keep_unpacked) for index in span]
        self.device = self.layers[0].first_norm.device
        self.is_first, self.is_last = span.start == 0, span.stop == config.num_hidden_layers
        self.adapters: dict[str, Adapter] = {}
        _, num_groups, width = self.layers[0].heads
        self.cache = torch.zeros(len(span), 2, num_rows, num_groups, width, dtype=dtype, device=self.device)

    @property
    def cache_bytes(self) -> int:
        return self.cache.numel() * self.cache.element_size()

    def load_adapter(self, name: str, folder: Path) -> None:
        """Read an adapter's updates of this span.

        Raises:
            AdapterError: the folder holds no adapter that fits.
        """
        shape = shape_of(self.net.config.to_dict())
        self.adapters[name] = read_adapter(folder, shape, self.span, self.dtype, self.device)

    def unload_adapter(self, name: str) -> None:
        del self.adapters[name]

    @torch.inference_mode()
    def run(self, batch: MicroBatch, hidden: Tensor | None) -> Tensor | Output:
        """Compute a micro-batch.

        Args:
            hidden: (T, H) from the stage before; None at the first stage.

        Returns:
            (T, H) for the next stage; from the last one, what the micro-batch asks for.
        """
        x = self.forward(batch, hidden)
        return self._finish(batch, x) if self.is_last else x

    @torch.inference_mode()
    def forward(self, batch: MicroBatch, hidden: Tensor | None) -> Tensor:
        """Return the hidden states (T, H) behind the span's last layer, and fill the cache."""
        for source, target, count in batch.copies:
            self.cache[:, :, target : target + count] = self.cache[:, :, source : source + count].clone()
        if self.is_first:
            hidden = self.net.model.embed_tokens(self._ids(batch.input_ids)).to(self.dtype)
        assert hidden is not None, "stages after the first get hidden states"
        x = hidden.to(self.device)
        positions = self._ids(batch.positions)
        cosine, sine = (table[0] for table in self.net.model.rotary_emb(x, positions[None]))
        slots, segments = self._ids(batch.slots), self._make_segments(batch)
        for index in range(len(self.layers)):
            x = self._run_layer(index, x, batch, slots, segments, cosine, sine)
        return x

    @torch.inference_mode()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits. Shapes: (N, H) -> (N, V)."""
        norm = self.net.model.norm
        normed = normalise(hidden, norm.weight.to(self.dtype), norm.variance_epsilon)
        logits: Tensor = (normed @ self.net.lm_head.weight.to(self.dtype).t()).float()
        return logits

    def _run_layer(
        self,
        index: int,
        x: Tensor,
        batch: MicroBatch,
        slots: Tensor,
        segments: Segments,
        cosine: Tensor,
        sine: Tensor,
    ) -> Tensor:
        layer = self.layers[index]
        num_heads, num_groups, width = layer.heads
        normed = normalise(x, layer.first_norm, layer.eps)
        qkv = self._adapt(layer.qkv.forward(normed), normed, index, "qkv", batch)
        qkv = qkv.view(len(x), -1, width)
        rotated = rotate(qkv[:, : num_heads + num_groups], cosine, sine)
        keys, values = self.cache[index]
        keys[slots], values[slots] = rotated[:, num_heads:], qkv[:, num_heads + num_groups :]
        attended, _ = attend(
            rotated[:, :num_heads].contiguous(), keys[segments.key_rows], values[segments.key_rows], segments
        )
        flat = attended.flatten(1)
        y = self._adapt(layer.out.forward(flat, x), flat, index, "out", batch)
        normed = normalise(y, layer.second_norm, layer.eps)
        inner = gate(self._adapt(layer.gate_up.forward(normed), normed, index, "gate_up", batch))
        return self._adapt(layer.down.forward(inner, y), inner, index, "down", batch)

    def _adapt(self, out: Tensor, x: Tensor, index: int, product: str, batch: MicroBatch) -> Tensor:
        """Add the updates of each adapter to its own rows of a product, in place."""
        start = 0
        for name, num_rows in batch.adapters:
            rows = slice(start, start + num_rows)
            start += num_rows
            if name is None:
                continue
            for update in self.adapters[name].get((self.span[index], product), ()):
                out[rows, update.columns].addmm_(x[rows] @ update.down.t(), update.up.t(), alpha=update.scale)
        return out

    def _finish(self, batch: MicroBatch, hidden: Tensor) -> Output:
        wanted = sorted({draw.row for draw in batch.draws} | {score.row for score in batch.scores})
        if not wanted:
            return Output(batch.number, (), ())
        places = {row: place for place, row in enumerate(wanted)}
        logits = self.compute_logits(hidden[self._ids(wanted)])
        drawn = logits[self._ids([places[draw.row] for draw in batch.draws])] if batch.draws else logits[:0]
        scored = logits[self._ids([places[score.row] for score in batch.scores])] if batch.scores else logits[:0]
        targets = self._ids([score.token for score in batch.scores])
        return Output(batch.number, sample(drawn, batch.draws), choice_log_probs(scored, targets))

    def _make_segments(self, batch: MicroBatch) -> Segments:
        queries = tuple(segment.num_rows for segment in batch.segments)
        keys = tuple(sum(count for _, count in segment.keys) for segment in batch.segments)
        rows = [torch.arange(start, start + count) for segment in batch.segments for start, count in segment.keys]
        return Segments(
            query_lengths=queries,
            key_lengths=keys,
            max_queries=max(queries),
            max_keys=max(keys),
            cumulative_queries=self._ids([0, *accumulate(queries)]).int(),
            cumulative_keys=self._ids([0, *accumulate(keys)]).int(),
            key_rows=torch.cat(rows).to(self.device),
            prefix_slots=None,
            own_slots=None,
        )

    def _ids(self, numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(self.device)
