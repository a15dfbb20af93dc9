"""Llama's decoder layer, described once: its sizes, projections, norms, activation and the names of its tensors.

Other families are this layer with additions (families.py), which a shape carries.

Packed training, stages, merge, the memory planner and the checks of bases and adapters read this record when a model is built.
None of them names a projection or computes a width itself (tests/formula/test_llama.py). The forward passes of
finlora/model/layers/packed_layer.py and finlora/stage/stage.py are the only other code that knows the layer.

Source: transformers' modeling_llama.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from finlora.formula.families import PLAIN, Additions, find_family

Block = Literal["self_attn", "mlp"]
Product = Literal["qkv", "out", "gate_up", "down"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaShape:
    """Sizes of a Llama, and what its family adds to the layer."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    is_tied: bool = False
    """The output head is the embedding."""
    additions: Additions = PLAIN

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    def projection(self, name: str) -> tuple[int, int]:
        """Return (out, in) of a projection."""
        return find_projection(name).size(self)

    def product_scale(self, product: Product) -> float:
        """Return the factor of a product's result, LoRA's update included, before it is added to the residual stream."""
        return self.additions.residual_scale if product in ("out", "down") else 1.0

    @property
    def rotary_scale(self) -> float:
        """Factor of the rotary tables that turns the kernels' 1 / sqrt(d) into the base's `score_scale`: it is in q and in k."""
        scale = self.additions.score_scale
        return 1.0 if scale is None else (scale * self.head_dim**0.5) ** 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """A frozen matrix W (out, in) of the decoder layer, y = x W^T. It may carry LoRA: training, serving and merge
    support it on every projection."""

    name: str
    """In transformers, in PEFT and in `lora.target_modules`."""
    block: Block
    """Submodule of the layer."""
    product: Product
    """Projections of one product have the same input and are multiplied as one matrix, in the order of `PROJECTIONS`."""
    num_out: Callable[[LlamaShape], int]
    num_in: Callable[[LlamaShape], int]

    def size(self, shape: LlamaShape) -> tuple[int, int]:
        """Return (out, in)."""
        return self.num_out(shape), self.num_in(shape)

    def path(self, layer: int) -> str:
        """Return the module's name in a layer of the model."""
        return f"{layer_path(layer)}.{self.block}.{self.name}"


def _hidden(shape: LlamaShape) -> int:
    return shape.hidden_size


def _query(shape: LlamaShape) -> int:
    return shape.query_size


def _kv(shape: LlamaShape) -> int:
    return shape.kv_size


def _intermediate(shape: LlamaShape) -> int:
    return shape.intermediate_size


PROJECTIONS = (
    Projection(name="q_proj", block="self_attn", product="qkv", num_out=_query, num_in=_hidden),
    Projection(name="k_proj", block="self_attn", product="qkv", num_out=_kv, num_in=_hidden),
    Projection(name="v_proj", block="self_attn", product="qkv", num_out=_kv, num_in=_hidden),
    Projection(name="o_proj", block="self_attn", product="out", num_out=_hidden, num_in=_query),
    Projection(name="gate_proj", block="mlp", product="gate_up", num_out=_intermediate, num_in=_hidden),
    Projection(name="up_proj", block="mlp", product="gate_up", num_out=_intermediate, num_in=_hidden),
    Projection(name="down_proj", block="mlp", product="down", num_out=_hidden, num_in=_intermediate),
)
"""In the order of the layer's computation."""
PROJECTION_NAMES = tuple(projection.name for projection in PROJECTIONS)
PRODUCTS: Mapping[Product, tuple[Projection, ...]] = {
    product: tuple(projection for projection in PROJECTIONS if projection.product == product)
    for product in dict.fromkeys(projection.product for projection in PROJECTIONS)
}

ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
"""RMSNorm before attention (input of the product qkv) and before the MLP (input of gate_up)."""
QUERY_NORM, KEY_NORM = "self_attn.q_norm", "self_attn.k_norm"
"""RMSNorm of each query and each key head, in families that have them."""
ACTIVATIONS = ("silu", "swish")
"""Names in config.json of the MLP's activation: silu(gate) * up."""
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"

LLAMA_8B = LlamaShape(
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
"""Llama-3.1-8B."""
LLAMA_70B = LlamaShape(
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128256,
)
"""Llama-3.1-70B."""


class BaseTensor(NamedTuple):
    """A tensor of a base's files."""

    name: str
    shape: tuple[int, ...]
    is_projection: bool
    """Quantised at 8 and 4 bit. All others stay in the compute type."""


def shape_of(values: Mapping[str, Any]) -> LlamaShape:
    """Read the shape from transformers' config.to_dict() (finlora/model/source.py has it of a folder)."""
    heads = int(values["num_attention_heads"])
    return LlamaShape(
        hidden_size=int(values["hidden_size"]),
        intermediate_size=int(values["intermediate_size"]),
        num_layers=int(values["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(values.get("num_key_value_heads") or heads),
        head_dim=int(values.get("head_dim") or int(values["hidden_size"]) // heads),
        vocab_size=int(values["vocab_size"]),
        is_tied=bool(values.get("tie_word_embeddings", False)),
        additions=find_family(values).read(values),
    )


def find_projection(name: str) -> Projection:
    """Return the projection of a name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]


_BY_NAME = {projection.name: projection for projection in PROJECTIONS}


def product_columns(product: Product, shape: LlamaShape) -> Iterator[tuple[Projection, slice]]:
    """Yield each projection of a product with its columns there."""
    start = 0
    for projection in PRODUCTS[product]:
        stop = start + projection.num_out(shape)
        yield projection, slice(start, stop)
        start = stop


def product_width(product: Product, shape: LlamaShape) -> int:
    """Return the columns of a product."""
    return sum(projection.num_out(shape) for projection in PRODUCTS[product])


def layer_path(layer: int) -> str:
    """Return the module's name of a decoder layer."""
    return f"model.layers.{layer}"


def head_norms(shape: LlamaShape) -> tuple[str, ...]:
    """Return the names of a layer's norms of heads."""
    return (QUERY_NORM, KEY_NORM) if shape.additions.has_head_norms else ()


def list_tensors(shape: LlamaShape) -> Iterator[BaseTensor]:
    """Yield the tensors of a base in the order of the computation."""
    table, norm = (shape.vocab_size, shape.hidden_size), (shape.hidden_size,)
    yield BaseTensor(EMBEDDING, table, is_projection=False)
    for layer in range(shape.num_layers):
        for projection in PROJECTIONS:
            yield BaseTensor(f"{projection.path(layer)}.weight", projection.size(shape), is_projection=True)
            if projection.name in shape.additions.biases:
                yield BaseTensor(f"{projection.path(layer)}.bias", (projection.num_out(shape),), is_projection=False)
        for name in head_norms(shape):
            yield BaseTensor(f"{layer_path(layer)}.{name}.weight", (shape.head_dim,), is_projection=False)
        for name in (ATTENTION_NORM, MLP_NORM):
            yield BaseTensor(f"{layer_path(layer)}.{name}.weight", norm, is_projection=False)
    yield BaseTensor(FINAL_NORM, norm, is_projection=False)
    if not shape.is_tied:
        yield BaseTensor(HEAD, table, is_projection=False)
