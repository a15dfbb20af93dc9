"""finlora.yaml, the contract of an adapter: its base and training, so that it is never loaded on another base.

It is written last into an adapter folder; a folder without it is incomplete or was not made by FinLoRA. It holds the SHA-256
of the other files and of itself, which are checked before an adapter is loaded: any flipped bit in the folder is refused.
That of an adopted adapter names what is unknown.

tasks.yaml beside it holds the task files that the adapter was trained on: a machine that never saw one can ask its question.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from finlora.config import Bits, is_date
from finlora.configfile import settings_from_tree, show
from finlora.data.task import Task
from finlora.data.taskfile.load import task_file_from_tree
from finlora.data.taskfile.read import make_task
from finlora.durable import SEAL, hash_file, seal, unseal, write_whole
from finlora.errors import AdapterError, ConfigError
from finlora.formula.lora_config import LoraConfig
from finlora.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_file
from finlora.yamltext import parse_yaml, read_yaml

CONTRACT_FILE = "finlora.yaml"
TASKS_FILE = "tasks.yaml"
MERGED_FILE = "merged.yaml"
"""Record of base and adapter in the folder of a merged model."""
_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG, "config.yaml", TASKS_FILE)
_VERSION = 5
"""Format that is written. 4: all adapters were FinLoRA's own; 3: they could not bring tasks of task files."""
_WITHOUT_DATE = 2
"""Format of adapters that do not record the date in their prompts: where the chat template writes one, the day of training."""
_WITHOUT_HASHES = 1
"""Format of the first adapters, which list no files."""
_MAX_BYTES = 2**16
_MAX_TEXT = 1000
_MAX_TASKS_BYTES = 2**20
_logger = logging.getLogger(__name__)
QUANTISATION = {16: "none", 8: "LLM.int8", 4: "NF4, double quantisation"}


class HashedBase(Protocol):
    """A base, loaded or not, that an adapter is checked against."""

    @property
    def weights_hash(self) -> str: ...
    @property
    def tokenizer_hash(self) -> str: ...


class LoadedBase(HashedBase, Protocol):
    """A base that an adapter was trained on."""

    @property
    def revision(self) -> str | None: ...
    @property
    def bits(self) -> Bits: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Adopted:
    """Origin of an adapter that another program trained. Tasks are as the user states."""

    source: str
    """Hub id and commit, or the name of the folder that it was adopted from."""
    base_named: str | None
    """Base that its adapter_config.json names; None: it names none."""
    tasks: list[str]
    unknown: list[str]
    rewritten: list[str]
    """Keys of adapter_config.json that were written in another form with the same effect."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contract:
    """The base, data and settings that an adapter belongs to. None of a fact: unknown, as `adopted` says."""

    base: str
    """Hub id or folder of the base model."""
    revision: str | None
    """Hub commit of the base; None for a local folder."""
    weights_hash: str
    """`fingerprint_weights` of the base."""
    tokenizer_hash: str
    template: str | None
    bits: int | None
    """Bits of the base during training."""
    quantisation: str
    rank: int
    alpha: float
    target_modules: list[str]
    data_hashes: dict[str, str]
    """Task -> hash of the train split."""
    num_train_examples: int | None
    adapter_mib: float
    metrics: dict[str, float] = field(default_factory=dict)
    template_date: str | None = None
    """Date, such as 2024-07-26, that the chat template wrote into each prompt; None: it writes none, or a fixed one."""
    lora_variant: str = ""
    """What differs from plain LoRA: `rsLoRA; down_proj rank 16`; adapter_config.json decides."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Task of a task file -> hash of what it asks; the files themselves are in tasks.yaml."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 in hex of each other file in the folder; `write_contract` fills it in."""
    adopted: Adopted | None = None
    """None: FinLoRA trained it."""
    finlora: int = _VERSION
    """Version of this format."""

    @property
    def variant(self) -> str:
        """Name of the adapter in tables: `4bit-r4`."""
        return f"{self.bits}bit-r{self.rank}" if self.bits else f"adopted-r{self.rank}"

    @property
    def task_names(self) -> list[str]:
        """Tasks that it was trained on, as recorded or stated."""
        return [*self.data_hashes, *(self.adopted.tasks if self.adopted else ())]

    def describe_unknown(self) -> str:
        """Return what is unknown of an adopted adapter, as two sentences; empty for one of FinLoRA's own."""
        if self.adopted is None:
            return ""
        return f"Another program trained it ({self.adopted.source}). Unknown: {'; '.join(self.adopted.unknown)}."

    def check(self, folder: Path, base: HashedBase, template: str, bits: int | None = None) -> None:
        """Refuse another base, tokenizer or template than in training, and changed adapter files.

        Args:
            folder: the adapter's folder, for the message.
            bits: bits that the adapter must be trained at; None if other bits are intended, as in the paper, which trains at 4
                or 8 bit and evaluates at 8.

        Raises:
            AdapterError: names everything that differs and how to override.
        """
        self.check_files(folder)
        verb = "adopted" if self.adopted else "trained"
        found = {"weights hash": base.weights_hash, "tokenizer hash": base.tokenizer_hash, "template": template}
        expected = {"weights hash": self.weights_hash, "tokenizer hash": self.tokenizer_hash}
        expected["template"] = self.template or template
        if bits is not None:
            found["bits"], expected["bits"] = str(bits), str(self.bits)
        differing = [
            f"{key} is {found[key]}, {verb} with {expected[key]}" for key in found if found[key] != expected[key]
        ]
        if differing:
            is_template = len(differing) == 1 and template != self.template
            hint = f" Set model.template={self.template}." if is_template else ""
            raise AdapterError(
                f"{folder} was {verb} on {self.base} and does not fit here: {'; '.join(differing)}.{hint} Load the base, "
                f"tokenizer and template it was {verb} with, or edit its {CONTRACT_FILE} (and remove its line `sha256`) if you "
                "know that they are equal."
            )

    def choose_date(self, folder: Path, base_date: str | None, wanted: str | None = None) -> str | None:
        """Return the date that the chat template writes into the adapter's prompts: that of its training.

        Args:
            base_date: date of prompts to the base alone (finlora/data/chat_template.py), for old adapters that do not record
                one.
            wanted: the setting model.template_date, which must not differ; None: not set.

        Raises:
            AdapterError: another date is set.
        """
        if self.template is None or self.finlora <= _WITHOUT_DATE:
            if base_date is not None and self.template is not None:
                _logger.warning(
                    "%s does not record the date in its training prompts (the day of the training): its prompts now get %s. "
                    "Set model.template_date to the day of the training, or train the adapter again.",
                    *(folder, base_date),
                )
            return base_date
        if wanted is not None and wanted != self.template_date:
            raise AdapterError(
                f"{folder} was trained with the date {self.template_date or 'of the chat template itself'} in its prompts, and "
                f"model.template_date={wanted}: leave the setting out, the adapter's date is used."
            )
        return self.template_date

    def check_files(self, folder: Path) -> None:
        """Check the hashes of the adapter's files.

        Raises:
            AdapterError: names each file that is missing or differs.
        """
        if self.finlora == _WITHOUT_HASHES:
            _logger.warning("%s has no hashes of its files: damage would not be detected.", folder)
        faults = [
            f"{name} {'differs' if (folder / name).is_file() else 'is missing'}"
            for name, expected in self.files.items()
            if not (folder / Path(name).name).is_file() or hash_file(folder / Path(name).name) != expected
        ]
        if faults:
            raise AdapterError(
                f"{folder} has changed since it was written: {', '.join(faults)}. Copy the adapter again from where it was "
                "trained, or train it again."
            )


def write_contract(folder: Path, contract: Contract) -> None:
    """Write finlora.yaml atomically, with the hashes of the other files; this marks the adapter folder complete."""
    files = {name: hash_file(folder / name) for name in _FILES if (folder / name).is_file()}
    values = seal(dataclasses.asdict(dataclasses.replace(contract, files=files)))
    write_whole(folder / CONTRACT_FILE, yaml.safe_dump(values, sort_keys=False))


def read_contract(folder: Path) -> Contract:
    """Read finlora.yaml of an adapter folder.

    Raises:
        AdapterError: the folder or file is missing, has another format, or was changed.
    """
    path = folder / CONTRACT_FILE
    if not path.exists():
        raise AdapterError(f"adapter {folder} {_describe_missing(folder)}")
    try:
        check_file(path, _MAX_BYTES)
        return _build_contract(read_yaml(path, _MAX_BYTES), path)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise AdapterError(f"{path} is not an adapter contract ({error}): train again or restore the file.") from error


def _describe_missing(folder: Path) -> str:
    """Return what was found instead of a complete adapter, and what to do."""
    is_run = folder.name == "adapter" and (folder.parent / "config.yaml").is_file()
    if is_run or (folder / "config.yaml").is_file():
        if (folder / "adapter" / CONTRACT_FILE).is_file():
            return f"is the folder of a run: give {folder / 'adapter'}."
        return f"has no {CONTRACT_FILE}, so its training did not finish: run `finlora train` to its end, or give another folder."
    if folder.is_file():
        return "is a file: give the `adapter` folder of a finished run."
    if not folder.is_dir():
        return "does not exist: run `finlora train` to its end, or give another folder."
    if (folder / ADAPTER_CONFIG).is_file():
        return (
            f"is a PEFT adapter that FinLoRA did not train: it has no {CONTRACT_FILE}, which names the weights, tokenizer and "
            "template it was trained with. Run `finlora adopt FOLDER --base BASE --output NEW`: it writes one."
        )
    if (folder / "config.json").is_file():
        return "is a model, not an adapter: give it as model.base, with --base to use no adapter."
    return f"holds no {CONTRACT_FILE} and no {ADAPTER_CONFIG}: give the `adapter` folder of a finished run."


def _build_contract(values: Any, path: Path) -> Contract:
    """Check a contract's seal, format, texts and types.

    Raises:
        AdapterError: another version wrote it.
        ValueError: says what is wrong.
    """
    if not isinstance(values, dict):
        raise ValueError(f"it holds {show(values)}")
    try:
        record = unseal(values)
    except ValueError as error:
        raise ValueError(f"{error}; if you changed it on purpose, remove its line `{SEAL}`") from error
    version = record.get("finlora")
    if version is None:
        raise ValueError("it does not name its format")
    if isinstance(version, int) and version not in range(_WITHOUT_HASHES, _VERSION + 1):
        raise AdapterError(f"{path} has format {version}, this FinLoRA reads {_VERSION}: update FinLoRA.")
    for name, value in record.items():
        if not all(len(text) <= _MAX_TEXT and text.isprintable() for text in _list_texts([name, value])):
            raise ValueError(f"{show(name)} is {show(value)}")  # it could change what a terminal shows
    try:
        contract = settings_from_tree(Contract, record)
    except ConfigError as error:
        raise ValueError("; ".join(error.faults)) from error
    if contract.adopted is None and None in (contract.template, contract.bits, contract.num_train_examples):
        raise ValueError("template, bits or num_train_examples is null, and `adopted` does not say why")
    if contract.template_date is not None and not is_date(contract.template_date):
        raise ValueError(f"template_date={show(contract.template_date)}: expected a date such as 2024-07-26")
    return contract


def _list_texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value:
            yield from _list_texts(item)
        if isinstance(value, dict):
            yield from _list_texts(list(value.values()))


def make_contract(
    base: LoadedBase,
    name: str,
    lora: LoraConfig,
    template: str,
    data_hashes: dict[str, str],
    num_train_examples: int,
    adapter_mib: float,
    metrics: dict[str, float],
    template_date: str | None = None,
    tasks: dict[str, str] | None = None,
) -> Contract:
    """Return the contract of a newly trained adapter."""
    return Contract(
        base=name,
        revision=base.revision,
        weights_hash=base.weights_hash,
        tokenizer_hash=base.tokenizer_hash,
        template=template,
        bits=base.bits,
        quantisation=QUANTISATION[base.bits],
        rank=lora.saved.rank,
        alpha=lora.saved.alpha,
        lora_variant=lora.variant,
        target_modules=list(lora.target_modules),
        data_hashes=data_hashes,
        num_train_examples=num_train_examples,
        adapter_mib=round(adapter_mib, 3),
        metrics=metrics,
        template_date=template_date,
        tasks=tasks or {},
    )


def write_tasks(folder: Path, cards: Mapping[str, str]) -> None:
    """Write the cards of an adapter's tasks into its folder; none writes no file."""
    if cards:
        trees = {name: parse_yaml(card) for name, card in cards.items()}
        write_whole(folder / TASKS_FILE, yaml.safe_dump(trees, sort_keys=False, allow_unicode=True))


def read_tasks(folder: Path, contract: Contract) -> dict[str, Task]:
    """Return the tasks that an adapter brings, by name.

    Raises:
        AdapterError: tasks.yaml is missing, was changed, or is not of the contract's tasks.
    """
    return _read_tasks(folder, contract.tasks) if contract.tasks else {}


def read_merged_tasks(folder: Path) -> dict[str, Task]:
    """Return the tasks that a merged model has from its adapter, by name; none of another base.

    Raises:
        AdapterError: merged.yaml or tasks.yaml cannot be read, or they do not belong together.
    """
    record = folder / MERGED_FILE
    if not record.is_file() or not (folder / TASKS_FILE).is_file():  # merged before models brought tasks
        return {}
    try:
        tree = read_yaml(record, _MAX_TASKS_BYTES)
        expected = {str(name): str(digest) for name, digest in tree["contract"]["tasks"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise AdapterError(f"{record} is not the record of a merge ({error}): merge again.") from error
    return _read_tasks(folder, expected)


def _read_tasks(folder: Path, expected: Mapping[str, str]) -> dict[str, Task]:
    """Read tasks.yaml.

    Args:
        expected: task -> hash of what it asks.
    """
    path = folder / TASKS_FILE
    try:
        check_file(path, _MAX_TASKS_BYTES)
        trees = read_yaml(path, _MAX_TASKS_BYTES)
        if not isinstance(trees, dict) or not all(isinstance(tree, dict) for tree in trees.values()):
            raise ValueError(f"it holds {show(trees)}")
        tasks = {name: make_task(task_file_from_tree(tree)) for name, tree in trees.items()}
    except (OSError, ValueError, yaml.YAMLError, ConfigError) as error:
        raise AdapterError(f"{path} does not hold a list of tasks ({error}): copy the adapter again.") from error
    found = {name: task.card_hash for name, task in tasks.items()}
    if found != expected or any(name != task.name for name, task in tasks.items()):
        raise AdapterError(f"{path} holds other tasks than the adapter was trained on: copy the adapter again.")
    return tasks


def require_same_task(folder: Path, contract: Contract, name: str, card_hash: str | None) -> None:
    """Refuse to score or go on with an adapter on a task of its name that asks something else.

    Args:
        card_hash: of the prepared task; None: it is built in.

    Raises:
        AdapterError: names both hashes.
    """
    trained = contract.tasks.get(name)
    if name in contract.task_names and trained != card_hash:
        there, here = (value[:12] if value else "none, as a built-in task" for value in (trained, card_hash))
        raise AdapterError(
            f"{folder} was trained with task hash {there}, the prepared task {name} has {here}: "
            "its kind, labels or prompt were changed, which makes it another task. Prepare it from the file of that training, or "
            "give it another name and train on it."
        )
