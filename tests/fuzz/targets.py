"""Fuzz targets: each reads one input from outside, as a function of bytes, and may raise FinLoRA's own errors only.

Run by `python -m tests.fuzz` for minutes, and by test_fuzz.py for seconds. Each target has valid inputs (corpus.py),
which are mutated.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finlora.errors import FinloraError
from tests.fuzz.corpus import (
    BODIES,
    CORRECTIONS,
    EVENTS,
    GRAMMARS,
    HEADLINES,
    SHAPE,
    adapter_files,
    made,
    make_adapter,
    make_arrow,
    make_audit,
    make_config,
    make_keys,
    make_parity,
    make_prepared,
    make_reference,
    make_serve_config,
    make_vocabulary,
    nwgi_seed,
)


@dataclass(frozen=True)
class Target:
    name: str
    run: Callable[[bytes, Path], object]
    """Takes an input and an empty folder; raises what reading the input raises."""
    seeds: Callable[[], list[bytes]]


def run_one(target: Target, data: bytes) -> None:
    """Run a target on one input, in a temporary folder; passes over FinLoRA's own errors."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        target.run(data, folder)
    except FinloraError as error:
        str(error).encode()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _config(data: bytes, folder: Path) -> None:
    from finlora.configfile import config_to_tree, load_config, save_config

    (folder / "config.yaml").write_bytes(data)
    override = data.decode(errors="surrogateescape").splitlines()[:1]
    for overrides in ([], override):
        try:
            config = load_config(folder / "config.yaml", overrides)
        except FinloraError:
            continue
        save_config(config, folder / "again.yaml")
        assert config_to_tree(load_config(folder / "again.yaml")) == config_to_tree(config)


def _serve_config(data: bytes, folder: Path) -> None:
    import yaml

    from finlora.serve.settings import read_settings
    from finlora.yamltext import parse_yaml

    try:
        tree = parse_yaml(data.decode(errors="surrogateescape"))
    except yaml.YAMLError:
        return
    if isinstance(tree, dict):
        read_settings(tree)


def _keys(data: bytes, folder: Path) -> None:
    from finlora.serve.accounts.keys import KeyRing

    path = folder / "keys.yaml"
    path.write_bytes(data)
    path.chmod(0o600)
    ring = KeyRing(path, {"FINLORA_API_KEY": "a-key-of-the-fuzzer-alone"})
    assert ring.check("finlora-desk-" + "a" * 43) is None
    assert ring.check(data[:200].decode("latin-1")) is None or data.startswith(b"a-key-of-the-fuzzer-alone")


def _raw(task: str, names: Sequence[str]) -> Callable[[bytes, Path], object]:
    """Reader of a task, given the same bytes under all its file names."""

    def run(data: bytes, folder: Path) -> None:
        from finlora.data.sets.prepare import prepare_task

        source = folder / "raw"
        source.mkdir()
        for name in names:
            (source / name).write_bytes(data)
        prepare_task(task, source, folder / "out", None, "all", False, False, is_own=True)

    return run


def _prepared(data: bytes, folder: Path) -> None:
    from finlora.data.sets.prepared import read_prepared

    (folder / "synthetic_sentiment").mkdir()
    (folder / "synthetic_sentiment" / "test.parquet").write_bytes(data)
    for example in read_prepared(folder, "synthetic_sentiment", "test").examples:
        (example.prompt + example.answer).encode()


def _adapter_with(name: str) -> Callable[[bytes, Path], object]:
    """Adapter folder with one file replaced by the input."""

    def run(data: bytes, folder: Path) -> None:
        import torch

        from finlora.formula.llama import shape_of
        from finlora.model.adapter_files import check_adapter
        from finlora.model.contract import read_contract
        from finlora.stage.adapter_weights import read_adapter

        for file, content in adapter_files().items():
            (folder / file).write_bytes(content)
        (folder / name).write_bytes(data)
        read_contract(folder)
        check_adapter(folder)
        adapter = read_adapter(folder, shape_of(SHAPE), range(1), torch.float32, torch.device("cpu"), None)
        for updates in adapter.values():
            for update in updates:
                assert update.down.isfinite().all()
                assert update.up.isfinite().all()

    return run


def _base_with(name: str) -> Callable[[bytes, Path], object]:
    """Base model folder with one file replaced by the input."""

    def run(data: bytes, folder: Path) -> None:
        from finlora.config import ModelConfig
        from finlora.model.source import find_source, fingerprint_weights

        (folder / "config.json").write_text(json.dumps(SHAPE | {"model_type": "llama"}))
        (folder / "model.safetensors").write_bytes(adapter_files()["adapter_model.safetensors"])
        (folder / name).write_bytes(data)
        fingerprint_weights(find_source(ModelConfig(base=str(folder))))

    return run


def _manifest(data: bytes, folder: Path) -> None:
    from finlora.model.mirror import check_mirrored

    (folder / "mirror.json").write_bytes(data)
    check_mirrored(folder, lambda *_: None)


class _Desk:
    """Server that accepts everything up to the call of the model."""

    def __init__(self) -> None:
        from finlora.serve.accounts.keys import KeyRing

        self.keys = KeyRing(None, {"FINLORA_API_KEY": "a-key-of-the-fuzzer-alone"})
        self.config = SimpleNamespace(limits=SimpleNamespace(max_body_bytes=2**21, max_texts=256), allowed_origins=())
        self.meter = SimpleNamespace(count_request=lambda *_: None)

    def open_call(self, *_: object) -> object:
        from finlora.serve.failures import RefusedError

        raise RefusedError(404, "no model here", "model_not_found")

    def require_admin(self, *_: object) -> None: ...

    @property
    def shelf(self) -> object:
        return self.open_call()


_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/classify", "/v1/extract", "/v1/adapters/good/version")
_apps: list[Any] = []


def _body(data: bytes, folder: Path) -> None:
    """The whole application: the input as body, as body in two chunks, as headers and as path."""
    from finlora.serve.http.asgi import make_app

    if not _apps:
        _apps.append(make_app(_Desk(), has_proxy=False))  # type: ignore[arg-type]
    path, rest = _PATHS[data[0] % len(_PATHS)] if data else _PATHS[0], data[1:]
    headers = [(b"authorization", b"Bearer a-key-of-the-fuzzer-alone"), (b"content-type", b"application/json")]
    _ask(path, headers, [rest])
    _ask(path, headers, [rest[: len(rest) // 2], rest[len(rest) // 2 :]])
    _ask(path, [(b"authorization", b"Bearer " + rest), (b"content-length", rest)], [b""])
    _ask("/" + rest.decode("latin-1"), [*headers, (b"content-length", rest[:40])], [b""])


def _ask(path: str, headers: list[tuple[bytes, bytes]], parts: list[bytes]) -> None:
    status: list[int] = []
    waiting = [
        {"type": "http.request", "body": part, "more_body": index < len(parts) - 1} for index, part in enumerate(parts)
    ]

    async def receive() -> dict[str, Any]:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            status.append(message["status"])

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode("latin-1"),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    asyncio.run(_apps[0](scope, receive, send))
    assert len(status) == 1
    assert 200 <= status[0] < 500, status


def _stream(data: bytes, folder: Path) -> None:
    """A server's stream, whole and byte by byte: the pieces must be equal and hold printable text only."""
    from finlora.serve.http.client import read_extract, read_pieces, read_probabilities

    def collect(blocks: list[bytes]) -> tuple[str, str]:
        text = ""
        try:
            for piece in read_pieces(blocks, "here"):
                text += piece
        except FinloraError as error:
            return text, str(error)
        return text, "whole"

    whole = collect([data])
    assert whole == collect([data[index : index + 1] for index in range(len(data))])
    assert not any(ord(character) < 32 and character not in "\n\t" for character in whole[0])
    for read in (read_extract, read_probabilities):
        try:
            read(data, "here")
        except FinloraError:
            continue


def _audit(data: bytes, folder: Path) -> None:
    from finlora.serve.accounts.audit import verify_audit

    (folder / "audit-1.jsonl").write_bytes(data)
    verify_audit(folder / "audit-1.jsonl", ["0" * 64])


def _reference(data: bytes, folder: Path) -> None:
    from finlora.evaluate.reference import REFERENCE_FILE, read_references

    (folder / REFERENCE_FILE).write_bytes(data)
    for each in read_references(folder, "0" * 64):
        each.abstention_at(0.83)


def _parity(data: bytes, folder: Path) -> None:
    from finlora.evaluate.parity_report import PARITY_FILE, parity_table, read_parity

    for file, content in adapter_files().items():
        (folder / file).write_bytes(content)
    (folder / PARITY_FILE).write_bytes(data)
    parity_table(read_parity(folder))


def _adopted_with(name: str) -> Callable[[bytes, Path], object]:
    """Folder of another program's adapter with one file replaced by the input."""

    def run(data: bytes, folder: Path) -> None:
        from finlora.exchange.adopt import copy_adapter
        from finlora.formula.llama import shape_of

        (folder / "copy").mkdir()
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (folder / file).write_bytes(data if file == name else adapter_files()[file])
        copy_adapter(folder, folder / "copy", shape_of(SHAPE))

    return run


def _corrections(data: bytes, folder: Path) -> None:
    from finlora.data.sets.catalog import TASKS
    from finlora.feedback.corrections import read_corrections

    (folder / "corrections.jsonl").write_bytes(data)
    read_corrections(folder / "corrections.jsonl", TASKS["ner"], None)


def _grammar(data: bytes, folder: Path) -> None:
    """A JSON Schema from a client, or a regular expression where the bytes are no JSON object."""
    from finlora.grammar.compile import check_grammar, json_schema, regex

    text = data.decode(errors="replace")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        schema = None
    check_grammar(json_schema(schema) if isinstance(schema, dict) else regex(text), make_vocabulary())


_XBRL = [f"xbrl_{kind}_test.{date}.jsonl" for kind in ("xbrl_tags", "value") for date in ("20250310", "20250313")]
_ARROW = [f"fiqa-2018.{part}.arrow" for part in ("train", "validation", "test")]

_ALL = (
    Target("config", _config, made(make_config, "config.yaml")),
    Target("serve_config", _serve_config, made(make_serve_config, "config.yaml")),
    Target("keys", _keys, made(make_keys, "keys.yaml")),
    Target(
        "lines", _raw("fpb", ["Sentences_50Agree.txt"]), lambda: [b"Profit rose@positive\nSales fell@negative\n" * 4]
    ),
    Target("csv", _raw("headline", ["headline.csv"]), lambda: [HEADLINES]),
    Target("posts", _raw("tfns", ["sent_train.csv", "sent_valid.csv"]), lambda: [b'text,label\n"a ""b""",1\nc,2\n']),
    Target(
        "conll", _raw("ner", ["FIN5.txt", "FIN3.txt"]), lambda: [b"Ines NNP O I-PER\nsold VBD O O\n\nA NNP O I-ORG\n"]
    ),
    Target("jsonl", _raw("nwgi", ["nwgi_train.jsonl", "nwgi_test.jsonl"]), nwgi_seed),
    Target("filings", _raw("xbrl_tags", _XBRL), lambda: [b'{"context": "a", "target": "b", "doc_path": "c"}\n']),
    Target("arrow", _raw("fiqa", _ARROW), made(make_arrow, "stream", "file", "packed")),
    Target("parquet", _prepared, made(make_prepared, "few/synthetic_sentiment/test.parquet")),
    Target(
        "adapter_weights", _adapter_with("adapter_model.safetensors"), made(make_adapter, "adapter_model.safetensors")
    ),
    Target("adapter_config", _adapter_with("adapter_config.json"), made(make_adapter, "adapter_config.json")),
    Target("adopted_config", _adopted_with("adapter_config.json"), made(make_adapter, "adapter_config.json")),
    Target(
        "adopted_weights", _adopted_with("adapter_model.safetensors"), made(make_adapter, "adapter_model.safetensors")
    ),
    Target("parity", _parity, made(make_parity, "parity.json")),
    Target("contract", _adapter_with("finlora.yaml"), made(make_adapter, "finlora.yaml")),
    Target("base_config", _base_with("config.json"), lambda: [json.dumps(SHAPE | {"model_type": "llama"}).encode()]),
    Target("base_weights", _base_with("model.safetensors"), made(make_adapter, "adapter_model.safetensors")),
    Target(
        "base_index",
        _base_with("model.safetensors.index.json"),
        lambda: [b'{"weight_map": {"a": "model.safetensors", "b": "../model.safetensors"}}'],
    ),
    Target(
        "manifest",
        _manifest,
        lambda: [b'{"repository": "a/b", "commit": "c", "files": {"mirror.json": "0"}, "total_bytes": 3}'],
    ),
    Target("body", _body, lambda: list(BODIES)),
    Target("stream", _stream, lambda: list(EVENTS)),
    Target("audit", _audit, made(make_audit, "log")),
    Target("reference", _reference, made(make_reference, "reference.json")),
    Target("corrections", _corrections, lambda: [CORRECTIONS]),
    Target("grammar", _grammar, lambda: list(GRAMMARS)),
)
TARGETS = {target.name: target for target in _ALL}
