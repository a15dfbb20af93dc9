"""Disk cache of quantised bases: the next process reads 5 GB instead of quantising 16.

The trials of a search, the workers of a node and an evaluation after a training all load the same base at the same bits. The
first of them quantises it and writes the result; the others read it through the page cache, which holds it once for all of
them. Put the folder on a local disk, or into shared memory (/dev/shm).

Layout of FOLDER/BASE-4bit-KEY, KEY being a hash of the weights' fingerprint and of all that quantisation depends on:
    rest.safetensors       embedding, last norm and head
    layer-N.safetensors    decoder layer N: norms as they are, linear layers under bitsandbytes' names
    cache.json             the facts that KEY hashes, and each file's size and SHA-256; sealed, written last
Source of the names: bitsandbytes' QuantState.as_dict, which transformers' 4-bit checkpoints use too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finlora.config import Bits, ModelConfig
from finlora.durable import follow_umask, hash_file, scratch_folder, seal, unseal, write_whole
from finlora.errors import ModelError, ResourceError
from finlora.model.base_files import BaseFiles
from finlora.model.quantised import layer_from_tensors, layer_to_tensors

_MARK = "cache.json"
_HASHERS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseCache:
    """Folder of a quantised base, which may not be written yet."""

    folder: Path
    bits: Bits
    dtype: torch.dtype
    facts: Mapping[str, str]
    """The facts that the folder's name hashes."""

    @property
    def is_complete(self) -> bool:
        return self.read_files() is not None

    def read_files(self) -> dict[str, dict[str, Any]] | None:
        """Return size and SHA-256 of each file; None if the cache is incomplete or the list is damaged."""
        try:
            files = unseal(json.loads((self.folder / _MARK).read_text(encoding="utf-8")))["files"]
            return {name: {"bytes": int(file["bytes"]), "sha256": str(file["sha256"])} for name, file in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


class StoredBase:
    """Reader of a complete cache: tensors to a device, a file at a time, after a check of its hash.

    Raises:
        ModelError: a file is missing or has changed.
    """

    def __init__(self, cache: BaseCache, device: torch.device) -> None:
        self._cache, self._device = cache, device
        self._name = ""
        self._file: Any = None
        self._tensors: dict[str, list[str]] = {}
        self._files = cache.read_files() or {}
        for name, file in self._files.items():
            path = cache.folder / name
            if not path.is_file() or path.stat().st_size != file["bytes"]:
                raise ModelError(
                    f"{path} is missing or not of its {file['bytes']} bytes: delete {cache.folder}, the next run writes it "
                    "again."
                )
        # One core hashes slower than a GPU loads, so threads hash the next files ahead. That fills the page cache, so the disk is
        # read once.
        self._pool = ThreadPoolExecutor(_HASHERS, "hash-base")
        self._order = sorted(self._files, key=_read_order)
        self._hashes: dict[str, Future[str]] = {}

    def close(self) -> None:
        """Cancel the hashes ahead."""
        self._pool.shutdown(cancel_futures=True)

    def read_weight(self, name: str) -> Tensor:
        """Return a parameter that is not quantised."""
        self._open(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor.to(self._device)

    def read_layer(self, name: str, shape: torch.Size) -> nn.Module:
        """Return the quantised layer of a (out, in) weight."""
        self._open(name)
        tensors = {leaf: self._file.get_tensor(f"{name}:{leaf}") for leaf in self._tensors[name]}
        return layer_from_tensors(tensors, shape, self._cache.bits, self._cache.dtype, self._device)

    def _open(self, name: str) -> None:
        from safetensors import safe_open

        wanted = _file_of(name)
        if wanted == self._name:
            return
        if wanted not in self._files or self._hash(wanted) != self._files[wanted]["sha256"]:
            raise ModelError(
                f"{self._cache.folder / wanted} has changed since it was written: delete {self._cache.folder}, the next run "
                "writes it again; if it recurs, test the disk and the memory of this machine."
            )
        self._name = wanted
        self._file = safe_open(str(self._cache.folder / wanted), framework="pt", device="cpu")
        self._tensors = {}
        for key in self._file.keys():  # noqa: SIM118  (not a dict)
            owner, _, leaf = key.partition(":")
            self._tensors.setdefault(owner, []).append(leaf)

    def _hash(self, wanted: str) -> str:
        """Wait for a file's hash and return it; start hashing the next files."""
        index = self._order.index(wanted)
        for name in self._order[index : index + 1 + _HASHERS]:
            if name not in self._hashes:
                self._hashes[name] = self._pool.submit(hash_file, self._cache.folder / name)
        return self._hashes[wanted].result()


def find_cache(
    model: ModelConfig, files: BaseFiles, bits: Bits, dtype: torch.dtype, device: torch.device, seed: int
) -> BaseCache | None:
    """Return the cache of a base, written or not; None if `model.cache` is null or nothing is quantised."""
    if model.cache is None or bits == 16:
        return None
    fingerprint = files.weights_hash
    if fingerprint == "random":
        shape = hashlib.sha256((files.source.folder / "config.json").read_bytes()).hexdigest()[:16]
        fingerprint = f"random {shape} seed {seed} on {device.type}"
    facts = {
        "base": model.base,
        "weights": fingerprint,
        "bits": str(bits),
        "dtype": str(dtype),
        "bitsandbytes": importlib.metadata.version("bitsandbytes"),
    }
    own = {name: value for name, value in facts.items() if name != "base"}  # a moved base is the same
    key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    name = Path(model.base).name
    folder = Path(model.cache).expanduser() / f"{name}-{bits}bit-{key}"
    return BaseCache(folder=folder, bits=bits, dtype=dtype, facts=facts)


@contextlib.contextmanager
def await_cache(cache: BaseCache) -> Iterator[bool]:
    """Let one process at a time quantise a base; yields whether the cache is already complete.

    Raises:
        ResourceError: the folder cannot be made.
    """
    if cache.is_complete:
        yield True
        return
    try:
        cache.folder.parent.mkdir(parents=True, exist_ok=True)
        stream = cache.folder.with_suffix(".lock").open("a")
    except OSError as error:
        raise ResourceError(
            f"model.cache={cache.folder.parent} cannot be used ({error}): give a folder that you can write to, or null."
        ) from error
    with stream:
        with contextlib.suppress(
            OSError
        ):  # a file system without locks: every process writes, and the first to finish wins
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield cache.is_complete


def write_cache(cache: BaseCache, net: nn.Module) -> None:
    """Write a freshly loaded net, before its first forward pass. The folder appears complete or not at all.

    Raises:
        ResourceError: the disk is full, or cannot be written.
    """
    from safetensors.torch import save_file

    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        has_codes = hasattr(owner.weight, "quant_state") or getattr(owner.weight, "SCB", None) is not None
        is_quantised = has_codes and name.endswith(".weight")  # a bias stays as it is
        group = groups.setdefault(_file_of(name), {})
        if is_quantised:
            group |= {f"{name}:{leaf}": tensor for leaf, tensor in layer_to_tensors(owner).items()}
        else:
            group[name] = parameter.data
    try:
        with scratch_folder(cache.folder.parent, f".{cache.folder.name}-") as scratch:
            fresh = scratch / "fresh"
            fresh.mkdir()
            for file, tensors in groups.items():
                save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, str(fresh / file))
            files = {
                file: {"bytes": (fresh / file).stat().st_size, "sha256": hash_file(fresh / file)} for file in groups
            }
            write_whole(fresh / _MARK, json.dumps(seal({**cache.facts, "files": files}), indent=1))
            follow_umask(fresh)
            if not cache.is_complete:
                shutil.rmtree(cache.folder, ignore_errors=True)
                fresh.replace(cache.folder)
    except Exception as error:  # safetensors wraps the system's error
        raise ResourceError(
            f"the quantised base could not be written below {cache.folder.parent} ({error}): free disk space there, or set "
            "model.cache=null."
        ) from error


def _file_of(name: str) -> str:
    parts = name.split(".")
    return f"layer-{parts[2]}.safetensors" if parts[:2] == ["model", "layers"] else "rest.safetensors"


def _read_order(file: str) -> int:
    """Return the order in which files are read: the embedding's first, then layer after layer."""
    return int(file.removeprefix("layer-").removesuffix(".safetensors")) if file.startswith("layer-") else -1
