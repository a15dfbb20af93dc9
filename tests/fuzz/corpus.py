"""Seed corpus of each target: valid inputs, which the fuzzer mutates."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": False,
}


def made(make: Callable[[Path], None], *names: str) -> Callable[[], list[bytes]]:
    """Valid inputs: the files that `make` writes into a folder."""

    def seeds() -> list[bytes]:
        folder = Path(tempfile.mkdtemp(prefix="seed-"))
        try:
            make(folder)
            return [(folder / name).read_bytes() for name in names]
        finally:
            shutil.rmtree(folder)

    return seeds


def make_config(folder: Path) -> None:
    from finlora.configfile import load_config, save_config

    save_config(load_config(None), folder / "config.yaml")


def make_serve_config(folder: Path) -> None:
    import yaml

    from finlora.serve.settings import ServeConfig, to_args

    (folder / "config.yaml").write_text(yaml.safe_dump(to_args(ServeConfig())))


CORRECTIONS = (
    b'{"task": "ner", "text": "Rome met Ines.", "about": "Ines", "label": "person", "answered": "location", "index": 0}\n'
    b'{"task": "ner", "text": "Bo sold it.", "about": "Bo", "label": "person", "time": "2026-11-30T09:15+01:00"}\n'
)


def make_reference(folder: Path) -> None:
    from finlora.durable import seal
    from finlora.evaluate.reference import measure_labels

    facts = dataclasses.asdict(measure_labels(("bad", "good"), [[0.9, 0.1], [0.3, 0.7]], ["bad", "bad"]))
    own = {"task": "letters", "bits": 8, "is_partial": False, "data_hash": None, "created": "2026-01-01"}
    values = seal({"format": 1, "adapter_hash": "0" * 64, "tasks": [{**facts, **own}]})
    (folder / "reference.json").write_text(json.dumps(values))


def make_parity(folder: Path) -> None:
    from finlora.evaluate.parity_report import Parity, write_parity

    texts = dict.fromkeys(("task", "form", "base_hash", "data_hash", "compute_dtype", "device"), "x")
    numbers = {"num_rows": 9, "num_equal": 8, "seed": 1, "bits": 8, "trained_bits": 4, "is_partial": True}
    shares = dict.fromkeys(("mean_difference", "max_difference", "accuracy", "trained_accuracy"), 0.5)
    make_adapter(folder)
    write_parity(folder, folder, [Parity(**texts, **numbers, **shares)])


def make_keys(folder: Path) -> None:
    from finlora.serve.accounts.keys import add_key

    limits: dict[str, Any] = {"requests_per_minute": 3, "tokens_per_minute": None, "is_admin": False}
    add_key(folder / "keys.yaml", "desk", adapters=("ner",), **limits)


def make_prepared(folder: Path) -> None:
    from finlora.data.sets.prepare import prepare_task
    from finlora.data.sets.prepared import read_prepared, write_prepared

    prepare_task("synthetic_sentiment", None, folder, None, "all", False, False)
    from finlora.data.example import Splits
    from finlora.data.sets.catalog import task_named

    few = read_prepared(folder, "synthetic_sentiment", "test").examples[:3]
    facts: dict[str, Any] = {"variant": "as_published", "source": "generated", "version": "0", "dry_run": False}
    task = task_named("synthetic_sentiment")
    write_prepared(task, Splits(train=(), test=few), folder / "few", **facts, overwrite=True)


def make_arrow(folder: Path) -> None:
    import pyarrow as pa

    rows = {"sentence": ["Profit rose", "Sales fell"], "sentiment_score": [0.5, -0.5], "format": ["post", "headline"]}
    table = pa.table(rows | {"label": [0, 2]})
    with pa.OSFile(str(folder / "stream"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    with pa.OSFile(str(folder / "file"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    packed = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.OSFile(str(folder / "packed"), "wb") as file, pa.ipc.new_stream(file, table.schema, options=packed) as out:
        out.write_table(table)


def adapter_files() -> dict[str, bytes]:
    """Return the three files of an adapter for `SHAPE`, by name."""
    if not _files:
        folder = Path(tempfile.mkdtemp(prefix="seed-"))
        make_adapter(folder)
        _files.update({path.name: path.read_bytes() for path in folder.iterdir()})
        shutil.rmtree(folder)
    return _files


_files: dict[str, bytes] = {}


def make_adapter(folder: Path) -> None:
    import torch
    import yaml
    from safetensors.torch import save_file

    from finlora.model.contract import Contract

    prefix = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {f"{prefix}.lora_A.weight": torch.ones(2, 16), f"{prefix}.lora_B.weight": torch.ones(16, 2)}
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    settings = {"r": 2, "lora_alpha": 4.0, "target_modules": ["q_proj"], "peft_type": "LORA", "bias": "none"}
    more = {"task_type": "CAUSAL_LM", "init_lora_weights": True, "megatron_core": "megatron.core", "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(settings | more))
    texts = dict.fromkeys(("base", "weights_hash", "tokenizer_hash", "template", "quantisation"), "x")
    contract = Contract(
        **texts,
        revision=None,
        bits=4,
        rank=2,
        alpha=4.0,
        target_modules=["q_proj"],
        data_hashes={"fpb": "x"},
        num_train_examples=3,
        adapter_mib=0.1,
    )
    (folder / "finlora.yaml").write_text(yaml.safe_dump(dataclasses.asdict(contract)))


def make_audit(folder: Path) -> None:
    from finlora.serve.accounts.audit import AuditEntry, AuditLog

    texts: dict[str, Any] = dict.fromkeys(
        ("request_id", "key_id", "path", "model", "base_hash", "prompt_hash", "outcome"), "x"
    )
    log = AuditLog(folder)
    for _ in range(2):
        log.append(
            AuditEntry(**texts, adapter_hash=None, output_hash=None, prompt_tokens=1, completion_tokens=0, seconds=0.5)
        )
    log.close()
    log.path.rename(folder / "log")


EVENTS = (
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n'
    b'data: {"choices": [{"delta": {"content": "Gewinn \xc3\xbc"}}]}\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n',
    b'data: {"error": {"message": "a stage died", "code": "stage_lost"}}\n\n',
    b'{"answer": "12", "quote": {"start": 0, "end": 2}}',
    b'{"results": [{"probabilities": {"positive": 0.5, "negative": 0.5}}]}',
)
BODIES = (
    b'\x00{"model": "a", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "stop": ["x"]}',
    b'\x00{"model": "a", "messages": [{"role": "system", "content": "a"}], "stream": true, "logprobs": true}',
    b'\x01{"model": "a", "prompt": [1, 2, 3], "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "seed": 4, "n": 1}',
    b'\x02{"model": "a", "task": "fpb", "texts": ["a", "b"], "about": ["c", "d"], "threshold": 0.5}',
    b'\x03{"model": "a", "task": "xbrl_tags", "context": "<a>", "question": "b", "max_tokens": 3}',
    b'\x04{"version": "v1"}',
)


def nwgi_seed() -> list[bytes]:
    from finlora.data.prompts import seven_sentiment_prompt

    row = {"context": seven_sentiment_prompt("Profit rose"), "target": "neutral"}
    return [json.dumps(row).encode() + b"\n", json.dumps(row | {"target": "strong negative"}).encode()]


_NINE = "News,Price or Not,Price Direction Up,Price Direction Constant,Price Direction Down,Past Price,Future Price,"
HEADLINES = f"{_NINE}Past News,Future News,Asset Comparision\n".encode() + b'"gold, up",1,1,0,0,1,0,0,0,0\n' * 6


GRAMMARS = (
    b'{"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}, "maxItems": 3}}, "type": "object", "properties": {"a": '
    b'{"type": "string", "pattern": "^[a-z]{2,8}$"}, "b": {"anyOf": [{"$ref": "#/$defs/t"}, {"type": "null"}]}, "c": {"enum": '
    b'[1, "x"]}, "d": {"type": "number", "multipleOf": 0.5, "minimum": -3}, "e": {"format": "date"}}, "required": ["a", "b"]}',
    b'{"allOf": [{"properties": {"a": {"oneOf": [{"const": 1}, {"const": 2}]}}}, {"properties": {"^x": {"maxItems": 2}}}]}',
    rb"([A-Z][a-z]{1,20}|[^\s]+)* (Q[1-4]|H[12]) \d{4}(-\d{2}){0,2}",
)


@functools.cache
def make_vocabulary() -> Any:
    """A vocabulary of single bytes and an end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from finlora.grammar.vocabulary import Vocabulary

    words = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Vocabulary(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), 0)
