"""Record of Llama's layer compared with transformers' model; no other module repeats its names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import finlora
from finlora.formula.llama import (
    ACTIVATIONS,
    PRODUCTS,
    PROJECTION_NAMES,
    LlamaShape,
    list_tensors,
    product_columns,
    product_width,
    shape_of,
)

PACKAGE = Path(finlora.__file__).parent
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "vocab_size": 32}


def make_net(**settings):
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SIZES, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_key_value_heads": 2, "tie_word_embeddings": False},
        {"num_key_value_heads": 6, "tie_word_embeddings": True},
        {"num_key_value_heads": 3, "head_dim": 16, "tie_word_embeddings": False},  # not hidden / heads
    ],
)
def test_record_has_the_tensors_of_transformers_model(settings):
    net = make_net(**settings)
    own = {tensor.name: tensor.shape for tensor in list_tensors(shape_of(net.config.to_dict()))}
    assert own == {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}


def test_record_quantises_the_linear_layers_of_the_decoder_alone():
    net = make_net()
    linear = {f"{name}.weight" for name, module in net.named_modules() if isinstance(module, torch.nn.Linear)}
    quantised = {tensor.name for tensor in list_tensors(shape_of(net.config.to_dict())) if tensor.is_projection}
    assert quantised == linear - {"lm_head.weight"}


def test_projections_of_a_product_have_one_input_and_lie_side_by_side():
    shape = LlamaShape(
        hidden_size=48, intermediate_size=80, num_layers=1, num_heads=6, num_kv_heads=2, head_dim=8, vocab_size=32
    )
    for product, projections in PRODUCTS.items():
        assert len({projection.num_in(shape) for projection in projections}) == 1
        stop = 0
        for projection, columns in product_columns(product, shape):
            assert columns == slice(stop, stop + projection.num_out(shape))
            stop = columns.stop
        assert stop == product_width(product, shape)
    assert [columns for _, columns in product_columns("qkv", shape)] == [slice(0, 48), slice(48, 64), slice(64, 80)]


def test_activation_is_the_one_of_transformers_by_each_of_its_names():
    from transformers.activations import ACT2FN

    x = torch.linspace(-4, 4, 9)
    for name in ACTIVATIONS:
        torch.testing.assert_close(ACT2FN[name](x), x * torch.sigmoid(x))


def test_no_other_module_names_a_projection_or_a_tensor_of_lora():
    """A path with its own names would not follow the record. The default of lora.target_modules and the paper's are no paths."""
    copies = {}
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name == "formula" or file in (PACKAGE / "config.py", PACKAGE / "report" / "paper.py"):
            continue
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        words = [node.value for node in nodes if isinstance(node, ast.Constant)]
        words += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
        found = {word for word in words if word in {*PROJECTION_NAMES, "lora_A", "lora_B", "self_attn"}}
        if found:
            copies[str(file.relative_to(PACKAGE))] = found
    assert copies == {}
