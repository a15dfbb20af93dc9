"""A quantised base on disk, so that the next process reads 5 GB instead of quantising 16.

The trials of a search, the workers of a node and an evaluation after a training all load the same base at the same bits. The
first of them quantises it and writes what came out; the others read it through the page cache, which keeps it in memory once
for all of them. Put the folder on a local disk, or into shared memory (/dev/shm).

Layout of FOLDER/BASE-4bit-KEY, KEY being a hash of the weights' fingerprint and of all that quantisation depends on:
    rest.safetensors       embedding, last norm and head
    layer-N.safetensors    decoder layer N: norms as they are, linear layers under bitsandbytes' names
    cache.json             what KEY stands for, and each file's size and SHA-256; sealed, written last
Source: the names are those of bitsandbytes' QuantState.as_dict, which transformers' 4-bit checkpoints use as well.
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
    """Where a base lies, or would lie, quantised."""

    folder: Path
    bits: Bits
    dtype: torch.dtype
    facts: Mapping[str, str]
    """What the folder's name is a hash of."""

    @property
    def is_complete(self) -> bool:
        return self.read_files() is not None

    def read_files(self) -> dict[str, dict[str, Any]] | None:
        """Return size and SHA-256 of each file; None where they are not written to their end, or the list is damaged."""
        try:
            files = unseal(json.loads((self.folder / _MARK).read_text(encoding="utf-8")))["files"]
            return {name: {"bytes": int(file["bytes"]), "sha256": str(file["sha256"])} for name, file in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


class StoredBase:
    """Reads the tensors of a complete cache to a device, a file at a time, each compared with its hash first.

    Raises:
        ModelError: a file is missing or not as it was written.
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
                    f"{path} is missing or not of {file['bytes']} bytes as when it was written: delete {cache.folder}, the next "
                    "run writes it again."
                )
        # One core hashes slower than a GPU takes the numbers in, so the files that come next are hashed ahead, by threads. The
        # pages are those that are read next: it costs no second look at the disk.
        self._pool = ThreadPoolExecutor(_HASHERS, "hash-base")
        self._order = sorted(self._files, key=_place_of)
        self._hashes: dict[str, Future[str]] = {}

    def close(self) -> None:
        """Hash no more."""
        self._pool.shutdown(cancel_futures=True)

    def read_weight(self, name: str) -> Tensor:
        """Return a parameter that was not quantised."""
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
                f"{self._cache.folder / wanted} is not as it was written: delete {self._cache.folder}, the next run writes it "
                "again; if it recurs, test the disk and the memory of this machine."
            )
        self._name = wanted
        self._file = safe_open(str(self._cache.folder / wanted), framework="pt", device="cpu")
        self._tensors = {}
        for key in self._file.keys():  # noqa: SIM118  (not a dict)
            owner, _, leaf = key.partition(":")
            self._tensors.setdefault(owner, []).append(leaf)

    def _hash(self, wanted: str) -> str:
        """Return a file's hash, once it is there, and begin with those of the next ones."""
        index = self._order.index(wanted)
        for name in self._order[index : index + 1 + _HASHERS]:
            if name not in self._hashes:
                self._hashes[name] = self._pool.submit(hash_file, self._cache.folder / name)
        return self._hashes[wanted].result()


def find_cache(
    model: ModelConfig, files: BaseFiles, bits: Bits, dtype: torch.dtype, device: torch.device, seed: int
) -> BaseCache | None:
    """Return where the base's cache is or would be; None where none is asked for, or nothing is quantised."""
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
    own = {name: value for name, value in facts.items() if name != "base"}  # a base that was moved is the same
    key = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    name = Path(model.base).name
    folder = Path(model.cache).expanduser() / f"{name}-{bits}bit-{key}"
    return BaseCache(folder=folder, bits=bits, dtype=dtype, facts=facts)


@contextlib.contextmanager
def await_cache(cache: BaseCache) -> Iterator[bool]:
    """Let one process at a time quantise a base; yields whether it is written already.

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
            f"model.cache={cache.folder.parent} cannot be used ({error}): name a folder you may write to, or null."
        ) from error
    with stream:
        with contextlib.suppress(OSError):  # a file system without locks: each writes, and the first to end counts
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield cache.is_complete


def write_cache(cache: BaseCache, net: nn.Module) -> None:
    """Write a freshly loaded net, which has not computed yet. The folder appears whole or not at all.

    Raises:
        ResourceError: there is no room.
    """
    from safetensors.torch import save_file

    groups: dict[str, dict[str, Tensor]] = {}
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        is_quantised = hasattr(owner.weight, "quant_state") or getattr(owner.weight, "SCB", None) is not None
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
    except Exception as error:  # safetensors hides the system's error in one of its own
        raise ResourceError(
            f"the quantised base could not be written below {cache.folder.parent} ({error}): make room there, or set "
            "model.cache=null."
        ) from error


def _file_of(name: str) -> str:
    parts = name.split(".")
    return f"layer-{parts[2]}.safetensors" if parts[:2] == ["model", "layers"] else "rest.safetensors"


def _place_of(file: str) -> int:
    """Return the order in which files are read: the embedding's first, then layer after layer."""
    return int(file.removeprefix("layer-").removesuffix(".safetensors")) if file.startswith("layer-") else -1
