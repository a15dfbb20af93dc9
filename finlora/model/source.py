"""Lookup and checks of a base model's files before anything is loaded: config, safetensors shards, fingerprint."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finlora.config import ModelConfig
from finlora.configfile import show
from finlora.errors import ModelError
from finlora.formula.llama import EMBEDDING, HEAD, LlamaShape, shape_of
from finlora.machine.lean_imports import lean_imports
from finlora.machine.model_hub import explain_hub, find_hub_problem
from finlora.model.architecture import (
    StoredTensor,
    check_config,
    check_family,
    check_rotary,
    check_tensors,
)
from finlora.model.git_lfs import refuse_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

HUB_FILES = [
    "[!c]*.safetensors",  # not consolidated.safetensors, which holds Mistral's weights a second time
    *("*.safetensors.index.json", "config.json"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
]
"""Patterns of the files that a hub model needs. Newer models keep their chat template in a separate file."""
_MAX_HEADER_BYTES = 2**24  # 100 times what the largest Llama's needs
_COMPARED_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model's checked files and what they describe: an architecture that every path computes (architecture.py)."""

    folder: Path
    config: PreTrainedConfig
    """From config.json; `tie_word_embeddings` follows the files, which may hold a separate output head."""
    shape: LlamaShape
    shards: dict[str, Path]
    """Tensor name -> its file; empty for random weights."""
    tokenizer_path: Path
    revision: str | None
    has_own_head: bool = False
    """config.json ties the output head to the embedding, but the files hold a separate one, which is used."""


def find_source(model: ModelConfig) -> ModelSource:
    """Resolve a local folder or hub id and check that it is a complete base of a supported family in safetensors.

    Raises:
        ModelError: no model, another architecture, pickled weights, a missing or truncated shard, or a config key or tensor
            that some path would ignore.
    """
    folder, revision = _resolve_folder(model)
    config = _read_config(folder)
    shards, has_own_head = {}, False
    if model.weights != "random":
        tensors = _find_tensors(folder)
        has_own_head = config.tie_word_embeddings and _holds_own_head(tensors)
        if has_own_head:
            config.tie_word_embeddings = False
        check_tensors(folder, shape_of(config.to_dict()), tensors)
        shards = {name: tensor.path for name, tensor in tensors.items()}
    tokenizer_path = Path(model.tokenizer).expanduser() if model.tokenizer else folder
    return ModelSource(
        folder=folder,
        config=config,
        shape=shape_of(config.to_dict()),
        shards=shards,
        tokenizer_path=tokenizer_path,
        revision=revision,
        has_own_head=has_own_head,
    )


def fingerprint_weights(source: ModelSource) -> str:
    """Return 16 hex digits over each shard's header and 64 evenly spread blocks of 64 KiB.

    A full hash of 70B weights reads 141 GB; this reads 4 MiB a shard and still changes when a model was fine-tuned,
    requantised or re-sharded. Random weights have the fingerprint `random`.
    """
    if not source.shards:
        return "random"
    # The first adapters were trained on such bases without their head, so with it the base needs another fingerprint.
    digest = hashlib.sha256(b"own head" if source.has_own_head else b"")
    for shard in sorted(set(source.shards.values())):
        size = shard.stat().st_size
        digest.update(f"{shard.name}:{size}".encode())
        with shard.open("rb") as stream:
            for block in range(65):
                stream.seek(block * max(size - 65536, 0) // 64)
                digest.update(stream.read(65536))
    return digest.hexdigest()[:16]


def _resolve_folder(model: ModelConfig) -> tuple[Path, str | None]:
    folder = Path(model.base).expanduser()
    if folder.is_dir():
        return folder, None
    if folder.is_file():
        raise ModelError(
            f"model.base={model.base} is a file: give the folder of a Hugging Face model, with config.json, tokenizer.json and "
            "16-bit weights in *.safetensors. A GGUF file is quantised already and cannot be used."
        )
    is_hub_id = model.base.count("/") == 1 and not model.base.startswith((".", "/", "~"))
    if not is_hub_id:
        raise ModelError(
            f"model.base={model.base} is neither a folder here nor a hub id (owner/name): give one of the two, or run "
            "`finlora pretrain` for the small demo model."
        )
    from huggingface_hub import snapshot_download

    files = [name for name in HUB_FILES if "safetensors" not in name] if model.weights == "random" else HUB_FILES
    problem = find_hub_problem()
    try:
        path = Path(
            snapshot_download(
                model.base, revision=model.revision, allow_patterns=files, local_files_only=problem is not None
            )
        )
    except Exception as error:  # several libraries raise here; each error means that the files are missing
        if problem is not None:
            why = f"{problem}. Mirror it where the hub is reachable (`finlora prefetch`), and set model.base to its folder"
        else:
            why = explain_hub(error)
        raise ModelError(f"{model.base} is not in the local hub cache and could not be downloaded ({why}).") from error
    return path, path.name  # the snapshot folder is named by its commit


def _read_config(folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json: expected a Hugging Face model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise ModelError(f"{path} is not valid JSON ({error}): copy the model again.") from error
    family = check_family(folder, values if isinstance(values, dict) else {})
    if values.get("quantization_config"):
        raise ModelError(
            f"{folder} holds weights that are already quantised: give the 16-bit model, FinLoRA quantises while loading."
        )
    check_config(folder, values)
    with lean_imports():
        import transformers

        config_class = getattr(transformers, family.config_class)
    try:
        config: PreTrainedConfig = config_class.from_dict(values)
        shape_of(config.to_dict())
    except Exception as error:  # transformers raises a different error for each field
        raise ModelError(f"{path} does not describe a {family.title} model ({error}): copy the model again.") from error
    check_rotary(folder, config)
    return config


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the model's files. The order of candidates is transformers'."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        return _read_header(single)
    if index.is_file():
        return _read_shards(folder, index)
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    packed = [name for name in names if name.endswith(".gguf")]
    found = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no weights"
    if packed:
        found = f"weights of llama.cpp ({packed[0]}), which are quantised already"
    raise ModelError(
        f"{folder} holds {found}: FinLoRA reads model.safetensors or its shards with an index, nothing else."
    )


def _read_shards(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        # Path(...).name keeps a hostile index from pointing outside its folder.
        files = {str(name): folder / Path(file).name for name, file in weight_map.items()}
        if not files:  # no shards would mean random weights
            raise ValueError("it names no tensor")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is not a safetensors index ({error!r}): copy the model again.") from error
    there = {path.name for path in folder.iterdir() if path.is_file()}
    missing = sorted({path.name for path in files.values()} - there)
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} shards named by its index ({missing[0][:100]}, ...): copy them too."
        )
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(set(files.values())):
        held = _read_header(path)
        absent = {name for name, file in files.items() if file == path}.difference(held)
        if absent:
            raise ModelError(
                f"{path} lacks {len(absent)} tensors that the index puts there ({min(absent)}, ...): it belongs to "
                "another model or sharding, copy it again."
            )
        if twice := sorted(tensors.keys() & held.keys()):
            raise ModelError(
                f"{path} holds {show(twice[0])[1:-1]}, which {tensors[twice[0]].path.name} holds as well: copy the shards of one "
                "model again."
            )
        tensors |= held  # also tensors that the index does not name: transformers reads them
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file, after checking that its header and length agree."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header_is_whole = 0 < length <= min(size - 8, _MAX_HEADER_BYTES)
        try:
            header: Any = json.loads(stream.read(length)) if header_is_whole else None
        except (ValueError, RecursionError):
            header = None
    if header is None:
        refuse_pointer(path)
    try:
        tensors = {
            name: StoredTensor(
                path=path,
                dtype=str(entry["dtype"]),
                shape=tuple(map(int, entry["shape"])),
                start=8 + length + int(entry["data_offsets"][0]),
                end=8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max(tensor.end for tensor in tensors.values())
    except (AttributeError, KeyError, TypeError, IndexError, ValueError, OverflowError):
        raise ModelError(
            f"{path} is not a safetensors file ({size} bytes, unreadable header): copy it again."
        ) from None
    if size != end:
        raise ModelError(f"{path} has {size} bytes, its header says {end}: it is truncated, copy it again.")
    return tensors


def _holds_own_head(tensors: dict[str, StoredTensor]) -> bool:
    """Return whether the files hold an output head that differs from the embedding: transformers then does not tie them."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None or embedding is None:
        return False
    if head.dtype != embedding.dtype or head.end - head.start != embedding.end - embedding.start:
        return True
    stamps = tuple((tensor.path.stat().st_mtime_ns, tensor.path.stat().st_size) for tensor in (head, embedding))
    return not _are_equal(head, embedding, stamps)


@functools.lru_cache(maxsize=16)
def _are_equal(first: StoredTensor, second: StoredTensor, _stamps: tuple[tuple[int, int], ...]) -> bool:
    """Compare the bytes of two tensors of one size. A different head differs early, so only a copy is read completely.

    Args:
        _stamps: of both files, so that the cached answer is dropped when one is replaced.
    """
    with first.path.open("rb") as one, second.path.open("rb") as two:
        one.seek(first.start)
        two.seek(second.start)
        for start in range(first.start, first.end, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, first.end - start)
            if one.read(size) != two.read(size):
                return False
    return True
