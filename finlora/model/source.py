"""Find and check the files of a base model before anything is loaded: config, safetensors shards, fingerprint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finlora.config import ModelConfig
from finlora.errors import ModelError

if TYPE_CHECKING:
    from transformers import LlamaConfig

HUB_FILES = [
    *("*.safetensors", "*.safetensors.index.json", "config.json"),
    *("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "additional_chat_templates/*.jinja"),
]
"""Patterns of what is read of a model on the hub. Newer models keep their chat template in a file of its own."""
_MAX_HEADER_BYTES = 2**24  # 100 times what the largest Llama's needs


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a base model's files are. `shards` maps each tensor name to its file, empty for random weights."""

    folder: Path
    config: LlamaConfig
    shards: dict[str, Path]
    tokenizer_path: Path
    revision: str | None


def find_source(model: ModelConfig) -> ModelSource:
    """Resolve a local folder or hub id and check that it is a complete Llama-family model in safetensors.

    Raises:
        ModelError: nothing stands there, another architecture, pickled weights, or a missing or truncated shard.
    """
    folder, revision = _resolve_folder(model)
    config = _read_config(folder)
    shards = {} if model.weights == "random" else _find_shards(folder)
    tokenizer_path = Path(model.tokenizer).expanduser() if model.tokenizer else folder
    return ModelSource(folder, config, shards, tokenizer_path, revision)


def fingerprint_weights(source: ModelSource) -> str:
    """Return 16 hex digits over each shard's header and 64 evenly spread blocks of 64 KiB.

    A full hash of 70B weights reads 141 GB; this reads 4 MiB a shard and still changes when a model was fine-tuned,
    requantised or re-sharded. Random weights have the fingerprint `random`.
    """
    if not source.shards:
        return "random"
    digest = hashlib.sha256()
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
    is_hub_id = model.base.count("/") == 1 and not model.base.startswith((".", "/", "~"))
    if not is_hub_id:
        raise ModelError(
            f"model.base={model.base} is neither a folder here nor a hub id (owner/name): give one of the two, or run "
            "`finlora pretrain` for the small demo model."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    files = [name for name in HUB_FILES if "safetensors" not in name] if model.weights == "random" else HUB_FILES
    try:
        path = Path(snapshot_download(model.base, revision=model.revision, allow_patterns=files))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"{model.base} is not in the local hub cache and the hub did not give it ({type(error).__name__}): copy the model "
            "to this machine and set model.base to its folder, or log in to the hub (gated models need accepted terms)."
        ) from error
    return path, path.name  # the snapshot folder is named by its commit


def _read_config(folder: Path) -> LlamaConfig:
    from transformers import LlamaConfig

    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} has no config.json: expected a Hugging Face model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}): copy the model again.") from error
    family = values.get("model_type") if isinstance(values, dict) else None
    if family != "llama":
        raise ModelError(
            f"{folder} is a {family!r} model: FinLoRA runs the Llama family only (model_type llama), since its adapters, "
            "pipeline stages and memory plan are checked on that architecture."
        )
    if values.get("quantization_config"):
        raise ModelError(
            f"{folder} holds weights that are already quantised: give the 16-bit model, FinLoRA quantises while loading."
        )
    try:
        return LlamaConfig.from_dict(values)
    except Exception as error:  # transformers checks each field with an error of its own
        raise ModelError(f"{path} describes no Llama model ({error}): copy the model again.") from error


def _find_shards(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
            # Path(...).name keeps a hostile index from pointing outside its own folder.
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
        for path in sorted(set(files.values())):
            absent = {name for name, file in files.items() if file == path}.difference(_read_names(path))
            if absent:
                raise ModelError(
                    f"{path} lacks {len(absent)} tensors that the index puts there ({min(absent)}, ...): it is of another "
                    "model or sharding, copy it again."
                )
        return files
    if single.is_file():
        return dict.fromkeys(_read_names(single), single)
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
    found = f"only pickled weights ({pickled[0]}), which can run code when read" if pickled else "no weights"
    raise ModelError(
        f"{folder} holds {found}: FinLoRA reads model.safetensors or its shards with an index, nothing else."
    )


def _read_names(path: Path) -> list[str]:
    """Return the tensor names of a shard, after checking that its header and length agree."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header_is_whole = 0 < length <= min(size - 8, _MAX_HEADER_BYTES)
        try:
            header: Any = json.loads(stream.read(length)) if header_is_whole else None
        except (ValueError, RecursionError):
            header = None
    try:
        tensors = {name: entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"}
        end = max(tensors.values())
    except (AttributeError, KeyError, TypeError, IndexError, ValueError):
        raise ModelError(
            f"{path} is not a safetensors file ({size} bytes, unreadable header): copy it again."
        ) from None
    if size != 8 + length + end:
        raise ModelError(
            f"{path} has {size} bytes where its header says {8 + length + end}: it is cut short, copy it again."
        )
    return list(tensors)
