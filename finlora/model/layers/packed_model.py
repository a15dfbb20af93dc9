"""Packed training of a Llama with LoRA on any projection: loss and gradients of a pack; packed_layer.py computes a layer.

Shapes: T rows of a pack, N labelled rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finlora.data.packing import Form, Pack
from finlora.formula.llama import Product, shape_of
from finlora.formula.low_rank import Update, foreign_settings, read_settings
from finlora.model.layers.frozen_model import Layer, ModelEnds, read_layer
from finlora.model.layers.packed_layer import LayerContext, Seeds, answer_loss, layer_backward, run_layer
from finlora.model.layers.training_graphs import CapturedPasses
from finlora.model.memory.packed_memory import Recompute, casts_at_once

if TYPE_CHECKING:
    from peft import PeftModel


class PackedLlama(nn.Module):
    """Cross entropy summed over the answer tokens of a pack, with gradients of the adapter's parameters.

    Args:
        model: a Llama with PEFT's LoRA (see `refusal`). Its layers keep working, on memory shared with this module.
        dtype: type of the activations: bfloat16, or float32 for exact tests.
        recompute: what the backward pass computes again to save memory.
        keep_unpacked: hold a 4-bit base unpacked in `dtype`, which saves unpacking it twice a step.
        capture: replay both passes as one CUDA graph per form of pack (training_graphs.py); packs must then be padded.
        upcoming: packs of each form that are still to come, which is counted down; empty or None: not known.
    """

    def __init__(
        self,
        model: PeftModel,
        dtype: torch.dtype,
        *,
        recompute: Recompute = "none",
        keep_unpacked: bool = False,
        capture: bool = False,
        upcoming: Counter[Form] | None = None,
    ) -> None:
        super().__init__()
        if reason := refusal(model):
            raise ValueError(reason)
        self.model = model
        self.dtype = dtype
        self.recompute = recompute
        llama = model.get_base_model()
        shape, lora = shape_of(llama.config.to_dict()), read_settings(model.peft_config["default"].to_dict())
        assert lora is not None, "`refusal` reads it too"
        self.ends = ModelEnds(llama, shape, dtype)
        self.layers = [
            read_layer(layer, index, shape, dtype, keep_unpacked, lora=lora)
            for index, layer in enumerate(llama.model.layers)
        ]
        self.parameters_in_order = [
            parameter
            for layer in self.layers
            for updates in layer.lora.values()
            for update in updates
            for parameter in (update.down, update.up)
        ]
        self._casts: list[Tensor] = []
        if dtype != torch.float32 and casts_at_once(lora.target_modules):
            self.layers = [self._cast_updates(layer) for layer in self.layers]
        self._captured = CapturedPasses(self.loss_and_gradients, upcoming) if capture else None
        if capture:
            torch.cuda.empty_cache()  # graphs allocate in a pool of their own, which cannot use what loading left cached

    def forward(self, pack: Pack) -> Tensor:
        """Return the loss () float32 of a pack on host or device; its backward() fills the adapter's gradients."""
        has_dropout = self.training and any(layer.dropout for layer in self.layers)
        # From the CPU's generator, which the loop seeds by step and worker.
        seed = int(torch.randint(2**31, ())) if has_dropout else None
        loss: Tensor = _Loss.apply(self, pack, seed, *self.parameters_in_order)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def loss_and_gradients(self, pack: Pack, seed: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Run forward and backward pass of a pack on the device.

        Args:
            seed: () int32 of the pack's dropout; None: no dropout.

        Returns:
            The summed loss and the float32 gradients of `parameters_in_order`.
        """
        if self._casts:
            torch._foreach_copy_(self._casts, self.parameters_in_order)
        x = self.ends.embed(pack.input_ids)
        tables = self.ends.rotary_tables(x, pack.positions)
        unturned = tables if all(layer.is_rotated for layer in self.layers) else self.ends.unrotated_tables(tables[0])
        last = len(self.layers) - 1
        own_tables = [tables if layer.is_rotated else unturned for layer in self.layers]
        contexts = [LayerContext(pack.segments, None, *own, self.recompute) for own in own_tables[:last]]
        contexts.append(LayerContext(pack.last_segments, pack.label_rows, *own_tables[last], self.recompute))
        seeds = [self._derive_seeds(seed, index) for index in range(last + 1)]
        all_kept = []
        for layer, context, own in zip(self.layers, contexts, seeds, strict=True):
            x, kept = run_layer(x, layer, context, own)
            all_kept.append(kept)
        loss, grad = answer_loss(x, *self.ends.output_weights(), pack.targets, pack.weights)
        gradients: list[Tensor] = []
        for index in range(last, -1, -1):
            needs_x = index > 0
            kept = all_kept.pop()
            following, own_gradients = layer_backward(
                grad, kept, self.layers[index], contexts[index], seeds[index], needs_x=needs_x
            )
            gradients = own_gradients + gradients
            grad = grad if following is None else following
        return loss, gradients

    def _cast_updates(self, layer: Layer) -> Layer:
        """Return a layer whose updates read casts of A and B in the type of the activations. Each pass makes all of them at once:
        cast at each use they are 22 launches a layer, which an eager pass would wait for. Of q, k and v alone they are 8."""
        lora: dict[Product, tuple[Update, ...]] = {}
        for product, updates in layer.lora.items():
            casts = [(update.down.detach().to(self.dtype), update.up.detach().to(self.dtype)) for update in updates]
            self._casts += [cast for pair in casts for cast in pair]
            lora[product] = tuple(
                dataclasses.replace(update, down=down, up=up) for update, (down, up) in zip(updates, casts, strict=True)
            )
        return dataclasses.replace(layer, lora=lora)

    def _derive_seeds(self, seed: Tensor | None, index: int) -> Seeds:
        """Return the seed of each adapted product of a layer."""
        if seed is None:
            return None
        products = (product for product, updates in self.layers[index].lora.items() if updates)
        return {product: seed ^ _salt(index, product) for product in products}


class _Loss(torch.autograd.Function):
    """Autograd function whose forward computes loss and gradients together, and whose backward returns them."""

    @staticmethod
    def forward(ctx: Any, module: PackedLlama, pack: Pack, seed: int | None, *parameters: Tensor) -> Tensor:
        device = parameters[0].device
        with torch.autocast(device.type, enabled=False):
            if module._captured is not None:
                loss, ctx.gradients = module._captured.run(pack, seed, device)
            else:
                on_device = None if seed is None else torch.tensor(seed, dtype=torch.int32, device=device)
                loss, ctx.gradients = module.loss_and_gradients(pack.to(device), on_device)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return None, None, None, *torch._foreach_mul(gradients, grad)


_PRODUCT_SALTS: dict[Product, int] = {"qkv": 0, "out": 0x1B873593, "gate_up": 0x52DCE729, "down": 0x38495AB5}
"""Any 31 bits that are far apart."""


def _salt(index: int, product: Product) -> int:
    """Return 31 bits of a product's own, so that no two products of a pack have the same dropout masks."""
    return ((index * 0x9E3779B1) & 0x7FFFFFFF) ^ _PRODUCT_SALTS[product]


def refusal(model: PeftModel) -> str | None:
    """Return why a model cannot train packed; None: it can."""
    values = model.peft_config["default"].to_dict()
    settings = read_settings(values)
    if foreign_settings(values) or settings is None or settings.dora or len(model.peft_config) != 1:
        return "the adapter is not one plain LoRA without biases"
    return None
