"""Mirror of base models and adapters: hub files in plain folders, each checked by the hub's hash, for machines without a hub.

Layout of MIRROR/models/OWNER/NAME and MIRROR/adapters/OWNER/NAME: the files of one commit, and `mirror.json`, which names the
commit and the SHA-256 of each file. It is written last: a folder without it is incomplete. The folder can be copied to another
machine and checked there without a network.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from finlora.config import ModelConfig
from finlora.durable import hash_file, seal, unseal, write_whole
from finlora.errors import ModelError
from finlora.machine.host import require_space
from finlora.machine.model_hub import find_hub_problem
from finlora.model.adapter_files import ADAPTER_CONFIG
from finlora.model.source import HUB_FILES, find_source

MANIFEST = "mirror.json"
ADAPTER_HUB_FILES = [
    *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
]
"""Files of a hub adapter that `finlora adopt` reads, or names in its refusal."""
_LICENCES = ["LICENSE*", "USE_POLICY*", "NOTICE*"]
_TEMPLATES = "additional_chat_templates/"
"""The only subfolder of a model that is read."""
_SPARE_BYTES = 2**30
"""Bytes that stay free on the disk."""

Update = Callable[[str, int, int, str], None]
"""Callback for progress: name, bytes done, total bytes, note."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mirrored:
    """One mirrored model or adapter."""

    repository: str
    commit: str
    files: dict[str, str]
    """SHA-256 of each file, in hex, by its path in the folder."""
    total_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Remote:
    """One file on the hub. The hub names the SHA-256 of large files, and the git blob id (SHA-1) of others."""

    path: str
    size: int
    sha256: str | None
    blob_id: str | None

    def matches(self, path: Path) -> bool:
        if not path.is_file() or path.stat().st_size != self.size:
            return False
        if self.sha256 is not None:
            return hash_file(path) == self.sha256
        return _hash_blob(path) == self.blob_id


def mirror_model(name: str, mirror: Path, update: Update) -> Mirrored:
    """Download a model's files that FinLoRA reads, and its licence; resumes an interrupted download.

    Args:
        name: `owner/name`, or `owner/name@revision` for a branch, tag or commit.
        mirror: folder of all mirrored models.
        update: shows progress.

    Raises:
        ModelError: the model cannot be downloaded, a file has another hash, or it is no base that FinLoRA runs.
        ResourceError: the disk has too little space.
    """

    def check(folder: Path) -> None:
        find_source(ModelConfig(base=str(folder)))

    return _mirror(name, mirror / "models", (*HUB_FILES, *_LICENCES), ".safetensors", check, update)


def mirror_adapter(name: str, mirror: Path, update: Update) -> Mirrored:
    """Download a PEFT adapter's files, as `mirror_model` does a model's. `finlora adopt` checks them against a base."""

    def check(folder: Path) -> None:
        if not (folder / ADAPTER_CONFIG).is_file():
            raise ModelError(f"{name} holds no {ADAPTER_CONFIG}: it is no PEFT adapter. Give a model with --models.")

    return _mirror(name, mirror / "adapters", (*ADAPTER_HUB_FILES, *_LICENCES), (".safetensors", ".bin"), check, update)


def _mirror(
    name: str,
    parent: Path,
    patterns: Sequence[str],
    weights: str | tuple[str, ...],
    check: Callable[[Path], None],
    update: Update,
) -> Mirrored:
    """Download a repository's files.

    Args:
        parent: folder of all mirrored models, or adapters.
        patterns: of the files.
        weights: endings of weight files, one of which it must hold.
        check: of the folder, before mirror.json marks it complete.
    """
    repository, _, revision = name.partition("@")
    if repository.count("/") != 1 or repository.startswith((".", "/", "~")):
        raise ModelError(f"{name!r} is not a model of the hub: expected owner/name or owner/name@revision.")
    commit, remote = _list_files(repository, revision or None, patterns)
    if not any(file.path.endswith(weights) for file in remote):
        raise ModelError(
            f"{repository} holds no safetensors weights: FinLoRA reads nothing else. Choose another model."
        )
    folder = parent / repository
    (folder / MANIFEST).unlink(missing_ok=True)
    total, done = sum(file.size for file in remote), 0
    folder.mkdir(parents=True, exist_ok=True)
    missing = sum(file.size for file in remote if not (folder / file.path).is_file())
    require_space(folder, missing, "the missing files take", spare_bytes=_SPARE_BYTES)
    files = {}
    for file in remote:
        update(repository, done, total, file.path)
        path = folder / file.path
        if not file.matches(path):
            _fetch(repository, commit, file, folder)
        files[file.path] = hash_file(path)
        done += file.size
    update(repository, done, total, "")
    check(folder)
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the hub client's records of unfinished files
    mirrored = Mirrored(repository=repository, commit=commit, files=files, total_bytes=total)
    write_whole(folder / MANIFEST, json.dumps(seal(asdict(mirrored)), indent=2) + "\n")
    return mirrored


def list_mirrored(mirror: Path) -> list[Path]:
    """Return the complete folders of a mirror: models, then adapters."""
    return [path.parent for kind in ("models", "adapters") for path in sorted((mirror / kind).glob(f"*/*/{MANIFEST}"))]


def check_mirrored(folder: Path, update: Update) -> Mirrored:
    """Read every file of a mirrored model and compare its hash with the one in mirror.json.

    Raises:
        ModelError: names each file that is missing or differs.
    """
    path = folder / MANIFEST
    try:
        mirrored = Mirrored(**unseal(json.loads(path.read_text(encoding="utf-8"))))
        _check_names(mirrored)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}): run `finlora prefetch` again.") from error
    faults, done = [], 0
    for name, expected in mirrored.files.items():
        update(mirrored.repository, done, mirrored.total_bytes, name)
        file = folder / name
        try:
            is_there = file.is_file()
        except OSError:  # an impossible file name
            is_there = False
        if not is_there:
            faults.append(f"{name[:100]} is missing")
            continue
        done += file.stat().st_size
        if hash_file(file) != expected:
            faults.append(f"{name} differs")
    if faults:
        raise ModelError(
            f"{folder} differs from {mirrored.repository} at {mirrored.commit[:12]}: {', '.join(faults)}. Copy these files "
            "again, or run `finlora prefetch` where the hub is reachable."
        )
    update(mirrored.repository, done, mirrored.total_bytes, "")
    return mirrored


def _check_names(mirrored: Mirrored) -> None:
    """Raise ValueError if the manifest names files outside its folder: it may come from an untrusted source."""
    if not (isinstance(mirrored.files, dict) and mirrored.files):
        raise ValueError("it names no files")
    for name, expected in mirrored.files.items():
        inner = name.removeprefix(_TEMPLATES)
        if Path(inner).name != inner or not name.isprintable() or not isinstance(expected, str):
            raise ValueError(f"it names {name!r}, which is not a file of this folder")
    if not isinstance(mirrored.repository, str) or not isinstance(mirrored.commit, str):
        raise ValueError("its repository or commit is not text")
    if not isinstance(mirrored.total_bytes, int):
        raise ValueError("its size is not a number")


def _hash_blob(path: Path) -> str:
    """Return git's blob id of a file: SHA-1 over a header and its bytes. The hub has no other hash for small files."""
    content = path.read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content, usedforsecurity=False).hexdigest()


def _list_files(repository: str, revision: str | None, patterns: Sequence[str]) -> tuple[str, list[_Remote]]:
    from huggingface_hub import HfApi

    info = _ask_hub(repository, lambda: HfApi().model_info(repository, revision=revision, files_metadata=True))
    remote = [
        _Remote(
            path=sibling.rfilename,
            size=sibling.size,
            sha256=sibling.lfs.sha256 if sibling.lfs else None,
            blob_id=sibling.blob_id,
        )
        for sibling in info.siblings or []
        if "/" not in sibling.rfilename.removeprefix(_TEMPLATES)
        and any(fnmatch(sibling.rfilename, pattern) for pattern in patterns)
    ]
    return info.sha, remote


def _fetch(repository: str, commit: str, file: _Remote, folder: Path) -> None:
    from huggingface_hub import hf_hub_download

    _ask_hub(
        repository,
        lambda: hf_hub_download(repository, file.path, revision=commit, local_dir=folder, force_download=True),
    )
    if not file.matches(folder / file.path):
        (folder / file.path).unlink(missing_ok=True)
        raise ModelError(
            f"{repository}/{file.path} has another size or hash than the hub names, and was deleted: run the command "
            "again. If it recurs, look for a proxy that changes downloads."
        )


def _ask_hub(repository: str, ask: Callable[[], Any]) -> Any:
    """Call the hub's client; translate its errors into ours, which say what to do."""
    from huggingface_hub.errors import GatedRepoError

    if problem := find_hub_problem():
        raise ModelError(
            f"{repository} could not be downloaded ({problem}): prefetch on a machine that reaches it, and copy the mirror "
            "folder over."
        )
    try:
        return ask()
    except GatedRepoError as error:
        raise ModelError(
            f"{repository} is gated: accept its terms on its hub page, then `hf auth login` here or set HF_TOKEN."
        ) from error
    except Exception as error:  # errors of several libraries, all of which mean "not downloaded"
        said = next(iter(str(error).splitlines()), "no message")
        raise ModelError(
            f"{repository} could not be downloaded from the hub ({type(error).__name__}: {said}): prefetch on "
            "a machine that reaches it, with HF_HUB_OFFLINE unset, and copy the mirror folder over."
        ) from error
