"""Folder of an adapter that another program trained: local, of a mirror, or of the hub's cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finlora.configfile import show
from finlora.durable import scratch_folder
from finlora.errors import AdapterError
from finlora.machine.model_hub import explain_hub, find_hub_problem, is_offline
from finlora.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_file
from finlora.model.mirror import ADAPTER_HUB_FILES, MANIFEST

_PICKLED = "adapter_model.bin"
_MAX_TEXT_BYTES = 2**24
_MAX_SHOWN = 200


def find_folder(source: str) -> tuple[Path, str]:
    """Return an adapter's folder here, and what the contract calls it.

    Raises:
        AdapterError: there is no such folder, and it cannot be downloaded.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        mirrored = read_json(folder / MANIFEST)
        if isinstance(mirrored.get("repository"), str) and isinstance(mirrored.get("commit"), str):
            return folder, shorten(f"{mirrored['repository']}@{mirrored['commit']}")
        return folder, shorten(folder.absolute().name)
    name, _, revision = source.partition("@")
    if folder.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise AdapterError(
            f"{source} is neither a folder here nor a hub id (owner/name): give a folder with {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS}."
        )
    from huggingface_hub import snapshot_download

    problem = "HF_HUB_OFFLINE is set" if is_offline() else find_hub_problem()
    try:
        path = snapshot_download(
            name, revision=revision or None, allow_patterns=ADAPTER_HUB_FILES, local_files_only=problem is not None
        )
    except Exception as error:  # several libraries raise here; each error means that the files are missing
        raise AdapterError(
            f"{source} is not in the local hub cache and could not be downloaded ({problem or explain_hub(error)}). Where the "
            f"hub is reachable, run `finlora prefetch --adapters {source} --output MIRROR`, copy MIRROR here, and give "
            f"MIRROR/adapters/{name}."
        ) from error
    return Path(path), f"{name}@{Path(path).name}"  # the snapshot folder is named by its commit


@contextmanager
def without_links(folder: Path, parent: Path) -> Iterator[Path]:
    """Yield a folder of the same files: a copy where it is one of the hub's cache, whose files are links to others.

    Args:
        parent: of the copy.
    """
    if folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        yield folder
        return
    with scratch_folder(parent, ".hub-") as copy:
        for name in ADAPTER_HUB_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        try:
            yield copy
        except AdapterError as error:
            raise AdapterError(str(error).replace(str(copy), str(folder))) from error


def refuse_pickle(folder: Path) -> None:
    """Refuse weights that only a pickle holds.

    Raises:
        AdapterError: holds the command that converts them without running their code.
    """
    if (folder / ADAPTER_WEIGHTS).exists() or not (folder / _PICKLED).exists():
        return
    code = (
        "import sys, torch; from safetensors.torch import save_file; "
        "t = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
        "save_file({k: v.contiguous() for k, v in t.items()}, sys.argv[2], metadata={'format': 'pt'})"
    )
    raise AdapterError(
        f"{folder} holds {_PICKLED}, a pickle, which can run code when read: FinLoRA reads {ADAPTER_WEIGHTS} alone. "
        f'Convert it by the loader of torch that runs no code: python -c "{code}" {folder / _PICKLED} {folder / ADAPTER_WEIGHTS}'
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object of a file that may be missing; empty for anything else.

    Raises:
        AdapterError: it is no regular file of its folder.
    """
    if not path.exists():
        return {}
    check_file(path, _MAX_TEXT_BYTES)
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def shorten(text: str) -> str:
    """Return a text of another program as it may stand in a contract."""
    return text if text.isprintable() and len(text) <= _MAX_SHOWN else show(text)[1:-1]
