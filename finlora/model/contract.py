"""finlora.yaml: what an adapter folder says of itself, so that it is never put on a base it was not trained on.

It is the last file written into an adapter folder; a folder without it is incomplete or was not made by FinLoRA.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finlora.config import LoraConfig
from finlora.configfile import show
from finlora.errors import AdapterError
from finlora.model.adapter_files import check_file
from finlora.model.base import BaseModel
from finlora.yamltext import read_yaml

CONTRACT_FILE = "finlora.yaml"
_VERSION = 1
_MAX_BYTES = 2**16
_MAX_TEXT = 1000
QUANTISATION = {16: "none", 8: "LLM.int8", 4: "NF4, double quantisation"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """The base, data and settings that an adapter belongs to."""

    base: str
    """Hub id or folder of the base model."""
    revision: str | None
    """Hub commit of the base; None for a local folder."""
    weights_hash: str
    """`fingerprint_weights` of the base."""
    tokenizer_hash: str
    template: str
    bits: int
    """Bits of the base during training."""
    quantisation: str
    rank: int
    alpha: float
    target_modules: list[str]
    data_hashes: dict[str, str]
    """Task -> hash of the train split."""
    num_train_examples: int
    adapter_mib: float
    metrics: dict[str, float] = field(default_factory=dict)
    finlora: int = _VERSION
    """Version of this format."""

    @property
    def variant(self) -> str:
        """Name of the adapter in tables: `4bit-r4`."""
        return f"{self.bits}bit-r{self.rank}"

    def check(self, folder: Path, base: BaseModel, template: str, bits: int | None = None) -> None:
        """Refuse a base, tokenizer or template other than the adapter was trained with.

        Args:
            folder: the adapter's folder, for the message.
            bits: bits that the base must have been trained at; None where the caller chose its bits on purpose,
                as the paper does: it trains at 4 or 8 bit and evaluates at 8.

        Raises:
            AdapterError: names everything that differs and how to override.
        """
        self.check_hashes(folder, base.weights_hash, base.tokenizer_hash, template, bits)

    def check_hashes(
        self, folder: Path, weights_hash: str, tokenizer_hash: str, template: str, bits: int | None = None
    ) -> None:
        """The same where the base is not loaded, from its files' hashes."""
        found = {"weights hash": weights_hash, "tokenizer hash": tokenizer_hash, "template": template}
        expected = {"weights hash": self.weights_hash, "tokenizer hash": self.tokenizer_hash, "template": self.template}
        if bits is not None:
            found["bits"], expected["bits"] = str(bits), str(self.bits)
        differing = [
            f"{key} is {found[key]}, trained with {expected[key]}" for key in found if found[key] != expected[key]
        ]
        if differing:
            raise AdapterError(
                f"{folder} was trained on {self.base} and does not fit here: {'; '.join(differing)}. Load the base, tokenizer "
                f"and template it was trained with, or edit its {CONTRACT_FILE} if you know that they are equal."
            )


def write_contract(folder: Path, contract: Contract) -> None:
    """Write finlora.yaml as a whole; this marks the adapter folder complete."""
    temporary = folder / f".{CONTRACT_FILE}"
    temporary.write_text(yaml.safe_dump(dataclasses.asdict(contract), sort_keys=False), encoding="utf-8")
    temporary.replace(folder / CONTRACT_FILE)


def read_contract(folder: Path) -> Contract:
    """Read finlora.yaml of an adapter folder.

    Raises:
        AdapterError: the folder or file is missing, or is not this format.
    """
    path = folder / CONTRACT_FILE
    if not path.exists():
        what = "has no finlora.yaml, so its training did not finish" if folder.is_dir() else "does not exist"
        raise AdapterError(f"adapter {folder} {what}: run `finlora train` to its end, or give another folder.")
    try:
        check_file(path, _MAX_BYTES)
        values: Any = read_yaml(path, _MAX_BYTES)
        contract = Contract(**_check_kinds(values, path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, TypeError) as error:
        raise AdapterError(f"{path} is not an adapter contract ({error}): train again or restore the file.") from error
    return contract


def _check_kinds(values: Any, path: Path) -> dict[str, Any]:
    """Return the fields of a contract, each of its own kind; texts that could change what a terminal shows are refused.

    Raises:
        AdapterError: names the field.
    """
    hints = typing.get_type_hints(Contract)
    if not isinstance(values, dict):
        raise AdapterError(
            f"{path} is not an adapter contract (it holds {show(values)}): train again or restore the file."
        )
    if (version := values.get("finlora")) != _VERSION and isinstance(version, int):
        raise AdapterError(f"{path} has format {version}, this FinLoRA reads {_VERSION}: update FinLoRA.")
    for name, value in values.items():
        if name not in hints or not _is_kind(value, hints[name]):
            raise AdapterError(
                f"{path} is not an adapter contract ({show(name)} is {show(value)}): train again or restore the file."
            )
    return values


def _is_kind(value: object, hint: Any) -> bool:
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return any(_is_kind(value, kind) for kind in kinds)
    if origin is list:
        return isinstance(value, list) and all(_is_kind(item, kinds[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _is_kind(key, kinds[0]) and _is_kind(item, kinds[1]) for key, item in value.items()
        )
    if isinstance(value, str):
        return hint is str and len(value) <= _MAX_TEXT and value.isprintable()
    return isinstance(value, int | float if hint is float else hint) and not isinstance(value, bool)


def make_contract(
    base: BaseModel,
    name: str,
    lora: LoraConfig,
    template: str,
    data_hashes: dict[str, str],
    num_train_examples: int,
    adapter_mib: float,
    metrics: dict[str, float],
) -> Contract:
    """Collect what a freshly trained adapter must say of itself."""
    return Contract(
        base=name,
        revision=base.revision,
        weights_hash=base.weights_hash,
        tokenizer_hash=base.tokenizer_hash,
        template=template,
        bits=base.bits,
        quantisation=QUANTISATION[base.bits],
        rank=lora.rank,
        alpha=lora.alpha,
        target_modules=list(lora.target_modules),
        data_hashes=data_hashes,
        num_train_examples=num_train_examples,
        adapter_mib=round(adapter_mib, 3),
        metrics=metrics,
    )
