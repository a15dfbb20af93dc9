"""Parity of an adapter's served forms with the form of its training, on its own test rows: parity.json beside its weights.

`finlora parity` writes it. `finlora card` shows it, and a server compares the bits at which it serves with those of the training.
The contract does not list it: writing it changes no hash of the adapter and no approval.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finlora.durable import seal, write_whole
from finlora.errors import AdapterError, ConfigError
from finlora.evaluate.intervals import wilson_interval
from finlora.evaluate.sealed_rows import read_sealed_rows
from finlora.model.adapter_files import ADAPTER_WEIGHTS, hash_weights_and_settings
from finlora.model.contract import MERGED_FILE, Contract
from finlora.report.tables import TextTable, format_share
from finlora.yamltext import read_yaml

PARITY_FILE = "parity.json"
_VERSION = 1
_MAX_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class Parity:
    """Answers of one form beside those of the form of the training, on the same rows of a task."""

    task: str
    form: str
    """What answered, such as `8 bit`, or the kind of a merged model."""
    bits: int | None
    """Bits of the base that the adapter was put on; None: a model of its own, merged or exported."""
    trained_bits: int
    base_hash: str
    """`fingerprint_weights` of the model that answered."""
    num_rows: int
    is_partial: bool
    """Whether only a part of the test split was asked."""
    seed: int
    """Of the choice of rows."""
    data_hash: str
    """Hash of the prepared test split."""
    num_equal: int
    """Rows with the same label, or the same text."""
    mean_difference: float | None
    """Mean over rows of the largest difference of a label's probability; None: answers were generated."""
    max_difference: float | None
    accuracy: float
    """Share of right answers of this form."""
    trained_accuracy: float
    """The same of the form of the training."""
    compute_dtype: str
    device: str

    def __post_init__(self) -> None:
        if not 0 <= self.num_equal <= self.num_rows or self.num_rows < 1:
            raise ConfigError("its counts do not fit together")

    @property
    def agreement(self) -> float:
        return self.num_equal / self.num_rows

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the agreement."""
        return wilson_interval(self.num_equal, self.num_rows)


class MergedRecord(NamedTuple):
    """What merged.yaml says of a merged model's origin."""

    trained_bits: Any
    adapter_hash: Any
    """SHA-256 of the weights of the adapter; None in records of old versions."""
    onto: Any
    """`base` or `dequantised`, as `finlora merge --onto`."""


def read_merged_record(folder: Path) -> MergedRecord:
    """Read merged.yaml of a model's folder.

    Raises:
        FileNotFoundError: the model is no merged one.
        ValueError: it cannot be read.
    """
    try:
        record = read_yaml(folder / MERGED_FILE, _MAX_BYTES)
        contract = record["contract"]
        files = contract.get("files") or {}
        return MergedRecord(contract["bits"], files.get(ADAPTER_WEIGHTS), record.get("onto", "base"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error


def write_parity(folder: Path, adapter: Path, found: Sequence[Parity]) -> None:
    """Write rows into parity.json of a folder; earlier ones of other tasks and forms stay.

    Args:
        folder: of the adapter, or of a model made from it.
        adapter: whose hash the file holds.
    """
    digest = hash_weights_and_settings(adapter)
    try:
        kept = {(each.task, each.form): each for each in _read(folder, digest)}
    except AdapterError:  # damaged, or of other weights: it is written anew
        kept = {}
    kept |= {(each.task, each.form): each for each in found}
    rows = [dataclasses.asdict(kept[key]) for key in sorted(kept)]
    values = seal({"format": _VERSION, "adapter_hash": digest, "rows": rows})
    write_whole(folder / PARITY_FILE, json.dumps(values, indent=1) + "\n")


def read_parity(folder: Path) -> tuple[Parity, ...]:
    """Read the parity report of an adapter; without the file there are no rows.

    Raises:
        AdapterError: the file is damaged, or belongs to other weights or settings.
    """
    return _read(folder, hash_weights_and_settings(folder)) if (folder / PARITY_FILE).exists() else ()


def _read(folder: Path, digest: str | None) -> tuple[Parity, ...]:
    """Read the rows of a folder; `digest` is the hash of the adapter that they must be of, None where it is not here."""
    path = folder / PARITY_FILE
    if not path.exists():
        return ()
    again = "Run `finlora parity` to write it again."
    rows, found = read_sealed_rows(
        *(path, Parity),
        key="rows",
        version=_VERSION,
        max_bytes=_MAX_BYTES,
        what="a report as `finlora parity` writes it",
        again=again,
    )
    if digest not in (None, found):
        raise AdapterError(f"{path} belongs to another adapter ({found[:12]}, this is {str(digest)[:12]}). {again}")
    return rows


def find_doubt(folder: Path, contract: Contract, bits: int, min_agreement: float = 0.0) -> str:
    """Return why an adapter's answers at some bits are not shown to be those of its training; empty: they are.

    Args:
        bits: of the served base.
        min_agreement: least value of the lower end of the agreement's interval, of each task.
    """
    if contract.bits == bits:
        return ""
    if contract.bits is None:
        return (
            f"it is served at {bits} bit, and the bits of its training are unknown: adopt it again with --bits, if you know "
            "them, then run `finlora parity`"
        )
    how = f"run `finlora parity {folder} --bits {bits}`"
    try:
        found = [each for each in read_parity(folder) if each.bits == bits]
    except AdapterError as error:
        return str(error)
    missing = [task for task in contract.task_names if task not in {each.task for each in found}]
    if missing or not found:
        which = f" for {', '.join(missing)}" if found else ""
        return f"trained at {contract.bits} bit, it is served at {bits}, and no parity report covers that{which}: {how}"
    return _find_poor(found, min_agreement, f"serve it at {contract.bits} bit, or merge it with --onto dequantised")


def find_merged_doubt(folder: Path, weights_hash: str, bits: int, min_agreement: float = 0.0) -> str:
    """Return why the answers of a merged model are not shown to be those of its adapter's training.

    Empty: they are, or the model is no merged one. One that was merged onto the weights of the training needs a report only where
    an agreement is asked for.

    Args:
        folder: of the served base.
        weights_hash: `fingerprint_weights` of it.
        bits: at which it is served.
    """
    try:
        merged = read_merged_record(folder)
    except FileNotFoundError:
        return ""
    except ValueError as error:
        return f"its {MERGED_FILE} cannot be read ({error}): merge again"
    trained, onto = merged.trained_bits, merged.onto
    if bits == trained == 16:
        return ""
    try:
        found = [each for each in _read(folder, None) if each.bits is None and each.base_hash == weights_hash]
    except AdapterError as error:
        return str(error)
    if bits != 16 or not found:
        if bits == 16 and onto == "dequantised" and not min_agreement:
            return ""
        what = f"merged onto {'the weights of its training' if onto == 'dequantised' else 'the 16-bit base'}"
        how = f"run `finlora parity ADAPTER --merged {folder}`" if bits == 16 else "serve it at 16 bit"
        at = f"at {trained} bit" if trained else "at unknown bits"
        return f"its adapter was trained {at}; {what} it is served at {bits}, and no parity report covers that: {how}"
    return _find_poor(found, min_agreement, "serve base and adapter, or merge it with --onto dequantised")


def _find_poor(found: Sequence[Parity], min_agreement: float, remedy: str) -> str:
    """Return the row with the least agreement where that is below what is asked for; else an empty text."""
    worst = min(found, key=lambda each: each.interval[0])
    if worst.interval[0] >= min_agreement:
        return ""
    share = format_share(worst.agreement, *worst.interval)
    return (
        f"as served ({worst.form}) it gives the answer of its training in {share} % of {worst.num_rows:,} rows of {worst.task}, "
        f"and min_agreement={min_agreement:g} asks for a lower end of {100 * min_agreement:g} %: {remedy}"
    )


def parity_table(found: Sequence[Parity]) -> TextTable:
    """Return a row a form and task."""
    rows = tuple(
        (
            each.task,
            each.form,
            f"{each.num_rows:,}{'*' if each.is_partial else ''}",
            format_share(each.agreement, *each.interval),
            "generated" if each.mean_difference is None else f"{each.mean_difference:.4f}",
            "generated" if each.max_difference is None else f"{each.max_difference:.4f}",
            f"{100 * each.accuracy:.1f}",
            f"{100 * each.trained_accuracy:.1f} ({each.trained_bits} bit)",
            f"{each.device}, {each.compute_dtype}",
        )
        for each in found
    )
    notes = [
        "% of rows with the answer of the form of the training, with Wilson's 95 % interval. Difference: the largest one of a "
        "row's label probabilities."
    ]
    if any(each.is_partial for each in found):
        notes.append("* A part of the test split, chosen by a seed.")
    header = ("task", "served as", "rows", "equal answers", "mean difference", "largest", "accuracy", "in training")
    return TextTable(title="Parity with the training", header=(*header, "on"), rows=rows, notes=tuple(notes))
