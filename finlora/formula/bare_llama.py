"""Parameters of a base under transformers' names, without its forward pass: what a stage takes its weights from.

transformers' own model class takes longer to import than a small base to load. Training needs it, since PEFT and the padded
path run its forward pass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from finlora.formula.llama import ATTENTION_NORM, MLP_NORM, PROJECTIONS, LlamaShape, head_norms, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class BareLlama(nn.Module):
    """Parameters of a Llama, or of another family, on the meta device, to be replaced by a loader.

    Args:
        dtype: of the parameters.
    """

    def __init__(self, config: PreTrainedConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = config
        shape, eps = shape_of(config.to_dict()), float(config.rms_norm_eps)
        table = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, device="meta")
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding.from_pretrained(table)
        self.model.layers = nn.ModuleList(_make_layer(shape, eps, dtype) for _ in range(shape.num_layers))
        self.model.norm = Norm(shape.hidden_size, eps, dtype)
        self.lm_head = make_linear(shape.hidden_size, shape.vocab_size, dtype)


class Norm(nn.Module):
    """Weight and epsilon of an RMSNorm."""

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dtype=dtype, device="meta"))
        self.variance_epsilon = eps


class Rotary(nn.Module):
    """Rotary tables of positions, as transformers' LlamaRotaryEmbedding computes them.

    Args:
        config: whose rope_type finlora/model/architecture.py supports: the angles depend on the position alone.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        kind = config.rope_parameters["rope_type"]
        if kind == "default":
            width = shape_of(config.to_dict()).head_dim
            exponents = torch.arange(0, width, 2, dtype=torch.float) / width
            frequencies, self.scale = 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0
        else:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            frequencies, self.scale = ROPE_INIT_FUNCTIONS[kind](config)
        self.frequencies = nn.Buffer(frequencies, persistent=False)

    @torch.no_grad()
    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines in the type of x. Shapes: positions (B, T) -> (B, T, d)."""
        angles = positions[..., None].float() * self.frequencies.to(device=x.device, dtype=torch.float)
        both = torch.cat((angles, angles), dim=-1)
        return (both.cos() * self.scale).to(x.dtype), (both.sin() * self.scale).to(x.dtype)


def make_linear(num_in: int, num_out: int, dtype: torch.dtype, *, has_bias: bool = False) -> nn.Linear:
    """Return a linear layer on the meta device, whose parameters were not initialised.

    Initialising on the meta device imports torch's compiler.
    """
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = num_in, num_out
    linear.weight = nn.Parameter(torch.empty(num_out, num_in, dtype=dtype, device="meta"))
    bias = nn.Parameter(torch.empty(num_out, dtype=dtype, device="meta")) if has_bias else None
    linear.register_parameter("bias", bias)
    return linear


def _make_layer(shape: LlamaShape, eps: float, dtype: torch.dtype) -> nn.Module:
    layer = nn.Module()
    for projection in PROJECTIONS:
        if not hasattr(layer, projection.block):
            setattr(layer, projection.block, nn.Module())
        num_out, num_in = projection.size(shape)
        linear = make_linear(num_in, num_out, dtype, has_bias=projection.name in shape.additions.biases)
        setattr(getattr(layer, projection.block), projection.name, linear)
    for path in head_norms(shape):
        block, _, name = path.rpartition(".")
        setattr(getattr(layer, block), name, Norm(shape.head_dim, eps, dtype))
    for name in (ATTENTION_NORM, MLP_NORM):
        setattr(layer, name, Norm(shape.hidden_size, eps, dtype))
    return layer
