"""Gate of bases of every family: keys that a family does not have, and windows of attention."""

from __future__ import annotations

import json

import pytest
import torch
from family_bases import write_family_base

from finlora.config import ModelConfig
from finlora.engine.micro_batch import MicroBatch
from finlora.errors import ModelError
from finlora.model.base import load_base
from finlora.model.base_files import read_base_files
from finlora.model.source import find_source
from finlora.stage.stage import Stage

CPU = torch.device("cpu")
IDS = tuple(range(5, 205))


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "qwen3",
            {"layer_types": ["chunked_attention"] * 4},
            r"FinLoRA's Qwen3 does not compute: layer_types=\['chunked",
        ),
        ("qwen2", {"no_rope_layers": [1, 0, 1, 0]}, r"FinLoRA's Qwen2 does not compute: no_rope_layers=\[1, 0, 1, 0\]"),
        ("mistral", {"attention_bias": True}, "FinLoRA's Mistral does not compute: attention_bias=True"),
        ("mistral", {"sliding_window": "all"}, "FinLoRA's Mistral does not compute: sliding_window='all'"),
        ("granite", {"attention_dropout": 0.1}, r"attention_dropout=0.1\. .* set it to 0 in a copy"),
        (
            "granite",
            {"logits_scaling": 0.0},
            r"not describe a Granite model \(logits_scaling=0, expected a positive number",
        ),
        ("smollm3", {"no_rope_layers": [1]}, "does not describe a SmolLM3 model"),
    ],
)
def test_key_that_a_family_does_not_have_is_refused(tiny_base, tmp_path, name, changes, words):
    base = write_family_base(name, tmp_path / "base", tiny_base)
    edit_config(base, **changes)
    with pytest.raises(ModelError, match=words):
        find_source(ModelConfig(base=str(base)))


WINDOWS = [
    ("mistral", {"sliding_window": 128}),
    ("qwen2", {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}),
    ("smollm3", {"sliding_window": 128, "use_sliding_window": True}),
]


@pytest.mark.parametrize(("name", "window"), WINDOWS)
def test_sequences_longer_than_the_attention_window_are_refused(tiny_base, tmp_path, name, window):
    base = write_family_base(name, tmp_path / "base", tiny_base, **window)
    words = r"has sliding-window attention \(sliding_window=128\): .* at most 64, .* found 65: choose another base\."
    with pytest.raises(ModelError, match=words):
        read_base_files(ModelConfig(base=str(base), max_seq_len=65))
    settings = ModelConfig(base=str(base), compute_dtype="float32", max_seq_len=64)
    assert read_base_files(settings).shape.additions.window == 128
    stage = Stage(load_base(settings, 16, CPU, 0, is_bare=True).model, range(4), 256, torch.float32)
    batch = MicroBatch(0)
    batch.add(IDS, 0, range(len(IDS)), [(0, len(IDS))])
    batch.adapters.append((None, len(IDS)))
    full = stage.compute_logits(stage.forward(batch, None))
    with torch.inference_mode():
        own = load_base(settings, 16, CPU, 0).model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(
        full[:128], own[:128], rtol=1e-4, atol=1e-4
    )  # the first 128 tokens are within the window
    assert float((full[128:] - own[128:]).abs().max()) > 0.1  # behind it transformers' numbers are other ones


@pytest.mark.parametrize(
    ("name", "settings"), [("qwen2", {"sliding_window": 128}), ("mistral", {"sliding_window": None})]
)
def test_window_that_is_off_limits_nothing(tiny_base, tmp_path, name, settings):
    base = write_family_base(name, tmp_path / "base", tiny_base, **settings)
    assert read_base_files(ModelConfig(base=str(base))).shape.additions.window is None
