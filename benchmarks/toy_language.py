"""Toy task of zero_one_adam.py: a synthetic language, and a random Llama that learns it, in full or by adapters.

The language is a Markov chain over 64 tokens, each with four successors of unequal probability. Its entropy, the lowest loss
after the first token, is 1.11 nats; guessing gives ln 64 = 4.16.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from finlora.config import LoraConfig
from finlora.model.lora import attach_lora

VOCABULARY, CONTEXT = 64, 16
PROBABILITIES = (0.55, 0.25, 0.15, 0.05)
ENTROPY = -sum(p * math.log(p) for p in PROBABILITIES)
BASE_STEPS, BASE_ROWS, BASE_LEARNING_RATE = 150, 8, 1e-2
ALL_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_sentences(language: int, rows: int, seed: int) -> Tensor:
    """Sample sentences of the language's Markov chain. Shapes: (rows, CONTEXT)."""
    generator = torch.Generator().manual_seed(language)
    successors = torch.stack([torch.randperm(VOCABULARY, generator=generator)[:4] for _ in range(VOCABULARY)])
    generator.manual_seed(seed)
    columns = [torch.randint(VOCABULARY, (rows,), generator=generator)]
    for _ in range(CONTEXT - 1):
        choice = torch.multinomial(torch.tensor(PROBABILITIES), rows, replacement=True, generator=generator)
        columns.append(successors[columns[-1], choice])
    return torch.stack(columns, dim=1)


def loss_of(net: torch.nn.Module, rows: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token."""
    logits = net(input_ids=rows).logits[:, :-1]
    return cross_entropy(logits.reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1))


def make_net(seed: int) -> LlamaForCausalLM:
    """Build the random Llama."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            use_cache=False,
        )
    )


@functools.cache
def base_weights(seed: int) -> dict[str, Tensor]:
    """Return the weights of a net trained on another language, equal on every rank."""
    net = make_net(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=BASE_LEARNING_RATE, weight_decay=0.0)
    for rows in make_sentences(seed + 1000, BASE_STEPS * BASE_ROWS, seed).split(BASE_ROWS):
        optimizer.zero_grad()
        loss_of(net, rows).backward()
        optimizer.step()
    return net.state_dict()


def make_task(seed: int, parameters: str) -> Any:
    """Return the net to train: all its parameters (`full`), or rank-4 adapters on a net of another language (`lora`)."""
    net = make_net(seed)
    if parameters == "full":
        return net
    net.load_state_dict(base_weights(seed))
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0, target_modules=ALL_PROJECTIONS)
    return attach_lora(net, lora, "base", seed)
