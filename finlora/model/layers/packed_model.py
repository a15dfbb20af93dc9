"""A Llama with LoRA on attention projections, run on packed examples for training; packed_layer.py does the math.

Shapes: T rows of a pack, N labelled places, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finlora.data.packing import Pack
from finlora.model.formula.llama import shape_of
from finlora.model.formula.low_rank import foreign_settings, read_settings
from finlora.model.layers.frozen_model import ModelEnds, read_layer
from finlora.model.layers.packed_layer import Place, answer_loss, layer_backward, run_layer
from finlora.model.layers.training_graphs import CapturedPasses
from finlora.model.memory.packed_memory import Recompute, packing_refusal

if TYPE_CHECKING:
    from peft import PeftModel


class PackedLlama(nn.Module):
    """Summed cross entropy over the answer tokens of a pack; gradients reach the adapter's parameters alone.

    Args:
        model: a Llama with PEFT's LoRA on attention projections (see `refusal`). Its layers share memory with this module
            afterwards and go on working.
        dtype: type of the activations: bfloat16, or float32 for exact tests.
        recompute: memory against time.
        keep_unpacked: hold a 4-bit base unpacked in `dtype`, which saves unpacking it twice a step.
        capture: replay both passes as one CUDA graph a form of pack (training_graphs.py); packs must then be padded.
    """

    def __init__(
        self,
        model: PeftModel,
        dtype: torch.dtype,
        *,
        recompute: Recompute = "none",
        keep_unpacked: bool = False,
        capture: bool = False,
    ) -> None:
        super().__init__()
        if reason := refusal(model):
            raise ValueError(reason)
        self.model = model
        self.dtype = dtype
        self.recompute = recompute
        llama = model.get_base_model()
        shape, lora = shape_of(llama.config.to_dict()), read_settings(model.peft_config["default"].to_dict())
        self.ends = ModelEnds(llama, dtype)
        self.layers = [read_layer(layer, shape, dtype, keep_unpacked, lora=lora) for layer in llama.model.layers]
        self.parameters_in_order = [
            parameter for layer in self.layers for lora in layer.lora for parameter in (lora.down, lora.up)
        ]
        self._captured = CapturedPasses(self.loss_and_gradients) if capture else None
        if capture:
            torch.cuda.empty_cache()  # passes allocate in a pool of their own, to which what loading left over is of no use

    def forward(self, pack: Pack) -> Tensor:
        """Return the loss of a pack on the host or the device as a float32 scalar; backward() then reaches the adapter."""
        has_dropout = self.training and any(layer.dropout for layer in self.layers)
        # From the CPU's generator, which the loop seeds by step and worker.
        seed = int(torch.randint(2**31, ())) if has_dropout else None
        loss: Tensor = _Loss.apply(self, pack, seed, *self.parameters_in_order)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def loss_and_gradients(self, pack: Pack, seed: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Run a pack on the device forward and backward.

        Args:
            seed: () int32 of the pack's dropout; None for none.

        Returns:
            The summed loss and the float32 gradients of `parameters_in_order`.
        """
        x = self.ends.embed(pack.input_ids)
        cosine, sine = self.ends.rotary_tables(x, pack.positions)
        last = len(self.layers) - 1
        places = [Place(pack.segments, None, cosine, sine, self.recompute)] * last
        places.append(Place(pack.last_segments, pack.places, cosine, sine, self.recompute))
        seeds = [None if seed is None else seed ^ _layer_salt(index) for index in range(last + 1)]
        all_kept = []
        for layer, place, own in zip(self.layers, places, seeds, strict=True):
            x, kept = run_layer(x, layer, place, own)
            all_kept.append(kept)
        loss, grad = answer_loss(x, *self.ends.output_weights(), pack.targets)
        gradients: list[Tensor] = []
        for index in range(last, -1, -1):
            needs_x = index > 0
            kept = all_kept.pop()
            following, own_gradients = layer_backward(
                grad, kept, self.layers[index], places[index], seeds[index], needs_x=needs_x
            )
            gradients = own_gradients + gradients
            grad = grad if following is None else following
        return loss, gradients


class _Loss(torch.autograd.Function):
    """Hands loss and gradients, which are computed together, to autograd: the engine around sees a usual module."""

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


def _layer_salt(index: int) -> int:
    """Return a layer's own 31 bits, by which the layers of one pack draw different masks."""
    return (index * 0x9E3779B1) & 0x7FFFFFFF


def refusal(model: PeftModel) -> str | None:
    """Return in words why a model cannot run packed, or None where it can."""
    settings = model.peft_config["default"]
    if reason := packing_refusal(sorted(settings.target_modules)):
        return reason
    if foreign_settings(settings.to_dict()) or len(model.peft_config) != 1:
        return "the adapter is not one plain LoRA without biases"
    return None
