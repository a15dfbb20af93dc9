"""Facts of an adapter's base that no result holds: hub id, licence, end of its training data, and its files on this machine."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finlora.config import ModelConfig
from finlora.durable import unseal
from finlora.errors import FinloraError
from finlora.model.base_files import BaseFiles, read_base_files
from finlora.model.contract import Contract
from finlora.model.mirror import MANIFEST
from finlora.yamltext import parse_yaml

_CUTOFFS = {
    **dict.fromkeys(
        (
            *(
                f"meta-llama/{name}-{size}"
                for name in ("Llama-3.1", "Meta-Llama-3.1")
                for size in ("8B", "70B", "405B")
            ),
            *(f"meta-llama/Llama-3.2-{size}" for size in ("1B", "3B")),
            "meta-llama/Llama-3.3-70B",
            "meta-llama/Meta-Llama-3-70B",
        ),
        "2023-12-31",
    ),
    "meta-llama/Meta-Llama-3-8B": "2023-03-31",
}
"""Hub id without `-Instruct` -> last day of the month that the model card names as knowledge cutoff.
Source: MODEL_CARD.md of https://github.com/meta-llama/llama3 and https://github.com/meta-llama/llama-models."""
_MAX_README_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseFacts:
    """What is known of a base."""

    hub_id: str | None
    folder: Path | None
    """Its files on this machine. None: they are not here."""
    files: BaseFiles | None
    """None: `why_no_files` says why."""
    why_no_files: str
    licence: tuple[str, str] | None
    """Licence and the file that states it. None: not known."""
    cutoff: tuple[str, str] | None
    """Last day of its training data, as 2023-12-31, and the source. None: not known."""


def find_base_facts(contract: Contract, model: ModelConfig | None) -> BaseFacts:
    """Return what is known of an adapter's base. Never asks the network.

    Args:
        model: of the adapter's config. None: it cannot be read.
    """
    folder = _find_folder(contract)
    hub_id = find_hub_id(contract.base)
    files, why = _read_files(folder, model, contract)
    return BaseFacts(
        hub_id=hub_id,
        folder=folder,
        files=files,
        why_no_files=why,
        licence=find_licence(folder) if folder else None,
        cutoff=find_cutoff(hub_id),
    )


def find_hub_id(base: str) -> str | None:
    """Return the hub id of a base: the given one, or that of a mirrored folder; None where none is known."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        return base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else None
    try:
        repository = unseal(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))).get("repository")
    except (OSError, ValueError):
        return None
    return repository if isinstance(repository, str) else None


def find_cutoff(hub_id: str | None) -> tuple[str, str] | None:
    """Return the last day of a base's training data, and the source; None: not known."""
    day = _CUTOFFS.get((hub_id or "").removesuffix("-Instruct"))
    return (day, "Meta's model card of that base, which names a month: its last day") if day else None


def find_licence(folder: Path) -> tuple[str, str] | None:
    """Return the licence that a model's folder states, and the file: its README's `license`, or the name of a licence file."""
    matter = read_front_matter(folder / "README.md")
    if name := matter.get("license"):
        more = matter.get("license_name")
        return (f"{name} ({more})" if more else str(name)), str(folder / "README.md")
    for path in sorted(folder.glob("LICENSE*")):
        return f"text in {path.name}", str(path)
    return None


def read_front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML at the top of a Markdown file; empty where there is none."""
    try:
        if path.stat().st_size > _MAX_README_BYTES:
            return {}
        head, found, rest = path.read_text(encoding="utf-8").partition("---\n")
        matter, end, _ = rest.partition("\n---")
        tree = parse_yaml(matter) if found and end and not head.strip() else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _find_folder(contract: Contract) -> Path | None:
    folder = Path(contract.base).expanduser()
    if folder.is_dir():
        return folder
    if find_hub_id(contract.base) is None:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(contract.base, revision=contract.revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError, OSError):
        return None


def _read_files(folder: Path | None, model: ModelConfig | None, contract: Contract) -> tuple[BaseFiles | None, str]:
    if folder is None:
        return None, f"the base {contract.base} is not on this machine"
    if model is None:
        return None, "the adapter's config.yaml cannot be read"
    try:
        return read_base_files(dataclasses.replace(model, base=str(folder), revision=None)), ""
    except FinloraError as error:
        return None, str(error)
