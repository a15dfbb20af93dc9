"""Evidence of a card: all that files say about an adapter, each with its file, and a reason where none says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finlora.card.approvals import ApprovalState, judge_approvals
from finlora.card.base_facts import BaseFacts, find_base_facts, find_cutoff
from finlora.config import RunConfig, is_date
from finlora.configfile import load_config, show
from finlora.data.sets.prepared import PreparedSplit, SplitName, read_prepared
from finlora.durable import hash_file
from finlora.errors import AdapterError, ConfigError, FinloraError, ResultError
from finlora.evaluate.answer_table import AnswerTable, read_answer_table
from finlora.evaluate.parity_report import Parity, read_parity
from finlora.model.adapter_files import ADAPTER_WEIGHTS
from finlora.model.contract import CONTRACT_FILE, Contract, read_contract, read_tasks
from finlora.report.pairing import pair_results
from finlora.results import SEARCH_MARK, Result, list_result_files, read_results

CUTOFF_FIELD, LICENCE_FIELD, HUB_FIELD = "base_training_cutoff", "base_licence", "base_hub_id"
"""Fields whose answers are figures of the card too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """Evaluation of the adapter, beside its base's on the same questions, at the same bits and by the same method."""

    result: Result
    source: Path
    table: AnswerTable | None
    """Answers one by one. None: `why_no_table` says why."""
    why_no_table: str
    base: Result | None
    base_source: Path | None
    base_table: AnswerTable | None

    @property
    def name(self) -> str:
        """Task, with bits and method."""
        return f"{self.result.task}, {self.result.bits} bit, by {self.result.method or 'unknown method'}"

    @property
    def is_of_search(self) -> bool:
        """Whether a search's trial was scored, on examples held out from the training split."""
        return any((folder / SEARCH_MARK).is_file() for folder in self.source.parents)


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskData:
    """Prepared data of a task."""

    name: str
    train: PreparedSplit | None
    test: PreparedSplit | None
    why_not: tuple[str, ...]
    """Reasons for what is missing, or does not belong to this adapter."""
    folder: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that is known of an adapter."""

    folder: Path
    name: str
    """Of the run, or of the folder."""
    contract: Contract
    config: RunConfig | None
    """Settings of the training. None: `why_no_config` says why they are unknown."""
    why_no_config: str
    weights_hash: str
    """SHA-256 of the weights, as results hold it."""
    adapter_hash: str
    """SHA-256 over weights and settings; a server shows the first 16 digits."""
    contract_hash: str
    trained: Result | None
    """Result of the training."""
    trained_source: Path | None
    scored: tuple[Scored, ...]
    searched: tuple[Path, ...]
    """Where results were looked for."""
    tasks: tuple[TaskData, ...]
    cards: dict[str, str]
    """Task that the adapter brings -> its task file, as YAML."""
    base: BaseFacts
    approvals: ApprovalState
    parity: tuple[Parity, ...]
    why_no_parity: str
    """Why there is no parity report; empty: there is one."""
    fields: dict[str, str]
    """Answers that people gave in fields.yaml."""

    @property
    def cutoff(self) -> tuple[str, str] | None:
        """Last day of the base's training data with its source; None: not known."""
        if day := self.fields.get(CUTOFF_FIELD):
            return day, f"fields.yaml, {CUTOFF_FIELD}"
        return self.base.cutoff or find_cutoff(self.fields.get(HUB_FIELD))

    @property
    def hub_id(self) -> tuple[str, str] | None:
        """Hub id of the base with its source; None: not known."""
        if name := self.base.hub_id:
            return name, f"{CONTRACT_FILE}, or mirror.json of its folder"
        return (name, f"fields.yaml, {HUB_FIELD}") if (name := self.fields.get(HUB_FIELD)) else None

    @property
    def licence(self) -> tuple[str, str] | None:
        """Licence of the base with its source; None: not known."""
        if text := self.fields.get(LICENCE_FIELD):
            return text, f"fields.yaml, {LICENCE_FIELD}"
        return self.base.licence

    def count_test_rows(self, scored: Scored) -> int | None:
        """Return the rows of the whole test split of an evaluation; None: its data is not here."""
        test = self.data_of(scored.result.task).test
        return len(test.examples) if test is not None else None

    def data_of(self, task: str) -> TaskData:
        return next(each for each in self.tasks if each.name == task)


def collect_evidence(
    folder: Path, results: Sequence[Path] = (), data: Path | None = None, fields: dict[str, str] | None = None
) -> Evidence:
    """Read all that files say about an adapter.

    Args:
        folder: of the adapter.
        results: files or folders of results. Empty: the folder that the adapter's folder lies in, its run.
        data: folder of prepared tasks. None: data.dir of the adapter's config.
        fields: answers of fields.yaml.

    Raises:
        AdapterError: the adapter is incomplete or was changed.
        ResultError: a results file is broken, or a given path does not exist.
        ConfigError: base_training_cutoff of the fields is no date.
    """
    fields = fields or {}
    if (day := fields.get(CUTOFF_FIELD)) and not is_date(day):
        raise ConfigError(f"fields.yaml: {CUTOFF_FIELD}={show(day)}: expected a date such as 2023-12-31, or nothing.")
    contract = read_contract(folder)
    contract.check_files(folder)
    config, why_no_config = _read_config(folder)
    model, own_data = (config.model, Path(config.data.dir).expanduser()) if config else (None, None)
    name = config.name if config else folder.name
    if contract.adopted is not None:  # its config.yaml names base and LoRA settings alone
        config, why_no_config = None, f"another program trained it ({contract.adopted.source})"
    approvals = judge_approvals(folder)
    weights_hash = hash_file(folder / ADAPTER_WEIGHTS)
    searched = tuple(results) or (folder.parent,)
    found = _read_results(searched, is_given=bool(results))
    trained = [(result, source) for result, source in found if _is_training(result, weights_hash)]
    scored = _pair(found, contract, weights_hash)
    names = dict.fromkeys((*contract.task_names, *(each.result.task for each in scored)))
    data = data or own_data
    parity, why_no_parity = _read_parity(folder)
    test_hashes = {each.result.task: each.result.data_hash for each in scored}
    return Evidence(
        folder=folder,
        name=name,
        contract=contract,
        config=config,
        why_no_config=why_no_config,
        weights_hash=weights_hash,
        adapter_hash=approvals.bound.adapter_hash,
        contract_hash=approvals.bound.contract_hash,
        trained=trained[-1][0] if trained else None,
        trained_source=trained[-1][1] if trained else None,
        scored=scored,
        searched=searched,
        tasks=tuple(_read_task(each, data, contract, test_hashes.get(each)) for each in names),
        cards={name: task.card for name, task in read_tasks(folder, contract).items() if task.card},
        base=find_base_facts(contract, model),
        approvals=approvals,
        parity=parity,
        why_no_parity=why_no_parity,
        fields=fields,
    )


def _read_config(folder: Path) -> tuple[RunConfig | None, str]:
    try:
        return load_config(folder / "config.yaml"), ""
    except ConfigError as error:
        return None, str(error)


def _read_parity(folder: Path) -> tuple[tuple[Parity, ...], str]:
    try:
        found = read_parity(folder)
    except AdapterError as error:
        return (), str(error)
    return found, "" if found else f"`finlora parity {folder}` was not run"


def _read_results(paths: Sequence[Path], *, is_given: bool) -> list[tuple[Result, Path]]:
    """Return each result with its file. Where nothing was given, a run without results has none; a given path must have some."""
    found: list[tuple[Result, Path]] = []
    for path in paths:
        files = list_result_files(path)
        if not files and is_given:
            raise ResultError(f"{path} holds no results: give a results file, or a folder of runs.")
        found += [(result, file) for file in files for result in read_results(file)]
    return found


def _is_training(result: Result, weights_hash: str) -> bool:
    return result.kind == "training" and result.adapter_hash == weights_hash


def _pair(found: Sequence[tuple[Result, Path]], contract: Contract, weights_hash: str) -> tuple[Scored, ...]:
    """Return the evaluations that count of exactly these weights, each with that of its base."""
    own = [
        (result, source)
        for result, source in found
        if result.adapter_hash == weights_hash
        or (result.variant == "base" and result.base_hash == contract.weights_hash)
    ]
    sources = {id(result): source for result, source in own}
    paired = pair_results([result for result, _ in own])
    scored = []
    for run, result in paired.kept:
        if result.kind != "evaluation" or run.is_base:
            continue
        source, base = sources[id(result)], paired.base_of(run, result)
        table, why = _read_table(result, source)
        base_source = sources[id(base)] if base else None
        base_table = _read_table(base, base_source)[0] if base and base_source else None
        scored.append(
            Scored(
                result=result,
                source=source,
                table=table,
                why_no_table=why,
                base=base,
                base_source=base_source,
                base_table=base_table,
            )
        )
    return tuple(scored)


def _read_table(result: Result, source: Path) -> tuple[AnswerTable | None, str]:
    if result.answers is None or result.answers_hash is None:
        return (
            None,
            f"{source} names no table of answers: the evaluation was made before FinLoRA kept them, or the disk was full",
        )
    try:
        # The name comes from a file: only a plain one may reach the file system.
        return read_answer_table(source.parent / "answers" / Path(result.answers).name, result.answers_hash), ""
    except ResultError as error:
        return None, str(error)


def _read_task(name: str, folder: Path | None, contract: Contract, test_hash: str | None) -> TaskData:
    """Read a task's splits, and leave out those that have another hash than the adapter was trained or scored on."""
    train_hash = contract.data_hashes.get(name)
    if folder is None:
        return TaskData(name=name, train=None, test=None, why_not=("no folder of data is known",), folder=Path())
    reasons: list[str] = []

    def read(split: SplitName, expected: str | None) -> PreparedSplit | None:
        try:
            found = read_prepared(folder, name, split)
        except FinloraError as error:
            reasons.append(f"{split} split: {error}")
            return None
        if expected is not None and found.hash != expected:
            reasons.append(
                f"{split} split: {folder / name} holds another set (hash {found.hash[:12]}) than the adapter was "
                f"{'trained' if split == 'train' else 'scored'} on ({expected[:12]})"
            )
            return None
        return found

    train = read("train", train_hash) if contract.adopted is None else None
    if contract.adopted is not None:
        reasons.append("train split: the rows that another program trained it on are unknown")
    test = read("test", test_hash)
    return TaskData(name=name, train=train, test=test, why_not=tuple(reasons), folder=folder / name)
