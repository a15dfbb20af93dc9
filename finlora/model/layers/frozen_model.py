"""Frozen weights of a Llama as packed training and stages compute with them, read from the modules of transformers and PEFT.

Read once, when a model is built: a pass walks no module of a decoder layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from finlora.formula.llama import (
    ATTENTION_NORM,
    MLP_NORM,
    PRODUCTS,
    LlamaShape,
    Product,
    head_norms,
    product_columns,
)
from finlora.formula.low_rank import LoraSettings, Update, read_dropout, read_module
from finlora.model.layers.frozen_linear import FrozenWeight, freeze, is_nf4, unpack


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer; weights in the type of the activations."""

    first_norm: Tensor
    second_norm: Tensor
    qkv: FrozenWeight
    out: FrozenWeight
    gate_up: FrozenWeight
    down: FrozenWeight
    lora: Mapping[Product, tuple[Update, ...]]
    """In training, of each product. A stage keeps its adapters beside the layers (finlora/stage/adapter_weights.py)."""
    dropout: float
    eps: float
    heads: tuple[int, int, int]
    """Query heads, key-value heads, head width."""
    head_norms: Tensor | None = None
    """Weights of the RMSNorms of query and key heads (h + g, d)."""
    is_rotated: bool = True


class ModelEnds:
    """Embedding and rotary tables before the layers, final norm and output head behind them.

    A family's factors are in what they return: the factor of the logits in the final norm's weight, that of the attention scores
    in the rotary tables of queries and keys.
    """

    def __init__(self, net: Any, shape: LlamaShape, dtype: torch.dtype) -> None:
        self._model, self._head, self._dtype = net.model, net.lm_head, dtype
        self._embedding_scale, self._logits_scale = shape.additions.embedding_scale, shape.additions.logits_scale
        self._rotary_scale = shape.rotary_scale

    def embed(self, input_ids: Tensor) -> Tensor:
        """Shapes: (T,) -> (T, H)."""
        x: Tensor = self._model.embed_tokens(input_ids).to(self._dtype)
        return x if self._embedding_scale == 1 else x * self._embedding_scale

    def rotary_tables(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (T, d) of the positions (T,), in the type of x."""
        if self._rotary_scale == 1:
            cosine, sine = self._model.rotary_emb(x, positions[None])
            return cosine[0], sine[0]
        wide = self._model.rotary_emb(x.new_empty(0, dtype=torch.float), positions[None])
        cosine, sine = (table[0].mul(self._rotary_scale).to(x.dtype) for table in wide)
        return cosine, sine

    def unrotated_tables(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tables of layers without rotary embedding, which turn nothing, in the shape of another table."""
        return torch.full_like(cosine, self._rotary_scale), torch.zeros_like(cosine)

    def output_weights(self) -> tuple[Tensor, float, Tensor]:
        """Return the final norm's weight (H,) and epsilon, and the head (V, H)."""
        norm = self._model.norm
        weight = norm.weight if self._logits_scale == 1 else norm.weight * self._logits_scale
        return weight.to(self._dtype), norm.variance_epsilon, self._head.weight.to(self._dtype)


def read_layer(
    layer: nn.Module,
    index: int,
    shape: LlamaShape,
    dtype: torch.dtype,
    keep_unpacked: bool,
    *,
    lora: LoraSettings | None = None,
    consumes: bool = False,
) -> Layer:
    """Take the weights of one of transformers' decoder layers.

    Args:
        index: of the layer in the model.
        keep_unpacked: hold 4-bit weights unpacked.
        lora: settings of the adapter that PEFT has put on the layer; None: there is none.
        consumes: the layer itself need not go on working (finlora/model/layers/frozen_linear.py).
    """

    def take(product: Product) -> FrozenWeight:
        modules = []
        for projection in PRODUCTS[product]:
            holder, attribute = layer.get_submodule(projection.block), projection.name
            if hasattr(getattr(holder, attribute), "base_layer"):
                holder, attribute = getattr(holder, attribute), "base_layer"
            module = getattr(holder, attribute)
            if keep_unpacked and is_nf4(module):
                module = unpack(module, dtype)
                setattr(holder, attribute, module)
            modules.append(module)
        return freeze(modules, dtype, consumes=consumes, scale=shape.product_scale(product))

    updates: dict[Product, tuple[Update, ...]] = dict.fromkeys(PRODUCTS, ())
    dropout = 0.0
    for product in PRODUCTS:
        for projection, columns in product_columns(product, shape):
            if lora is not None and projection.name in lora.target_modules:
                module = layer.get_submodule(f"{projection.block}.{projection.name}")
                updates[product] += (
                    read_module(module, columns, lora.scale_of(projection.name) * shape.product_scale(product)),
                )
                dropout = read_dropout(module)
    first_norm, second_norm = (getattr(layer, name) for name in (ATTENTION_NORM, MLP_NORM))
    weights = [layer.get_parameter(f"{name}.weight").detach().to(dtype) for name in head_norms(shape)]
    counts = (shape.num_heads, shape.num_kv_heads)
    wide = [weight.expand(count, -1) for weight, count in zip(weights, counts, strict=False)]
    return Layer(
        first_norm=first_norm.weight.to(dtype),
        second_norm=second_norm.weight.to(dtype),
        qkv=take("qkv"),
        out=take("out"),
        gate_up=take("gate_up"),
        down=take("down"),
        lora=updates,
        dropout=dropout,
        eps=float(first_norm.variance_epsilon),
        heads=(shape.num_heads, shape.num_kv_heads, shape.head_dim),
        head_norms=torch.cat(wide) if wide else None,
        is_rotated=index not in shape.additions.unrotated,
    )
