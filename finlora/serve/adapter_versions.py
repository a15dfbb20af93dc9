"""Adapter folder of a server: which adapters it holds, which version of each is served, and whether that fits the base.

Layout of DIR:
    NAME/finlora.yaml ...        an adapter without versions
    NAME/adapter/finlora.yaml    a run folder of `finlora train`: its adapter, without versions
    NAME/v1/ NAME/v2/ ...        an adapter's versions; the newest complete one is served
    NAME/current                 name of a version, written by a roll-back: this version is served instead

Where approval is required, a version whose files are not approved is passed over, and an adapter without another one is refused.

The folder is the only state and is read for each request. So every replica serves an adapter as soon as it is copied in, and
a roll-back survives a restart. A folder without finlora.yaml is incomplete and is not served.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finlora.card.approvals import APPROVALS_FILE, judge_approvals
from finlora.data.question import Form
from finlora.data.task import Task
from finlora.durable import hash_file
from finlora.errors import AdapterError, ApprovalError
from finlora.evaluate.parity_report import PARITY_FILE, find_doubt
from finlora.evaluate.reference import REFERENCE_FILE, Reference, read_references
from finlora.model.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_adapter, check_file
from finlora.model.contract import CONTRACT_FILE, Contract, read_contract, read_tasks
from finlora.serve.served_model import ServedBase
from finlora.serve.settings import ServeConfig
from finlora.stage.adapter_weights import hash_adapter

CURRENT_FILE = "current"
RUN_ADAPTER = "adapter"
"""Folder of the adapter in a run folder (finlora/train/run/run_folder.py)."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_VERSION = re.compile(r"v(\d{1,9})", re.ASCII)
_MAX_CURRENT_BYTES = 64
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedAdapter:
    """Version of an adapter that fits the base."""

    name: str
    version: str | None
    """None: a folder without versions."""
    folder: Path
    hash: str
    """Hash of weights and settings, 16 hex digits."""
    contract: Contract
    template_date: str | None
    """Date that the chat template writes into its prompts: that of its training."""
    tasks: Mapping[str, Task] = field(default_factory=dict)
    """Tasks of task files that it was trained on, which only it brings."""
    references: tuple[Reference, ...] = ()
    """How it answers its test splits, for monitoring. Empty: the folder holds no reference, or one of other weights."""
    doubt: str = ""
    """Why its answers are not shown to be those of its training; empty: they are."""

    @property
    def forms(self) -> dict[str, Form]:
        """How a user asks its own tasks."""
        return {name: task.form for name, task in self.tasks.items() if task.form is not None}

    @property
    def notices(self) -> list[str]:
        """What a user should know before the answers are trusted."""
        doubt = f"{self.doubt[0].upper()}{self.doubt[1:]}." if self.doubt else ""
        return [said for said in (self.contract.describe_unknown(), doubt) if said]

    @property
    def engine_name(self) -> str:
        """Name in the engine. Other weights have another name, so requests in flight keep the weights they started with."""
        return f"{self.name}@{self.version or '-'}#{self.hash}"


class AdapterShelf:
    """Adapters of one folder, for one base.

    Args:
        folder: DIR; None: no adapters.
        require_approval: whether an adapter needs an approval that holds for its files (finlora/card/approvals.py).
        min_agreement: least agreement with its training that an adapter of other bits needs (parity_report.py). None: none.
    """

    def __init__(
        self,
        folder: Path | None,
        base: ServedBase,
        *,
        require_approval: bool = False,
        min_agreement: float | None = None,
    ) -> None:
        self._folder, self._base, self._require_approval = folder, base, require_approval
        self._min_agreement = min_agreement
        # Folder -> stamp of its files, and the adapter or refusal read then: hashing 21 MiB for each request is too slow.
        self._known: dict[Path, tuple[tuple[int, ...], ServedAdapter | AdapterError]] = {}

    @classmethod
    def of(cls, config: ServeConfig, base: ServedBase) -> AdapterShelf:
        """Return the shelf of a server."""
        return cls(
            config.adapters_folder,
            base,
            require_approval=config.require_approval,
            min_agreement=config.min_agreement,
        )

    def list_names(self) -> list[str]:
        """Return the names of all adapters with a complete version, whether or not it fits the base."""
        if self._folder is None or not self._folder.is_dir():
            return []
        return sorted(
            entry.name
            for entry in self._folder.iterdir()
            if _NAME.fullmatch(entry.name)
            and ((_find_unversioned(entry) / CONTRACT_FILE).is_file() or _list_versions(entry))
        )

    def describe_unserved(self) -> list[str]:
        """Return the reason for each adapter folder that is not served because it has no finlora.yaml."""
        if self._folder is None or not self._folder.is_dir():
            return []
        found = []
        for entry in sorted(self._folder.iterdir()):
            if (entry / ADAPTER_CONFIG).is_file() and not (entry / CONTRACT_FILE).is_file():
                try:
                    read_contract(entry)
                except AdapterError as error:
                    found.append(str(error))
        return found

    def log_notices(self) -> None:
        """Read what may be served, so that the log says at the start what is refused, and what an operator should know."""
        for name in self.list_names():
            versions: Sequence[str | None] = _list_versions(self._find(name)) if self._require_approval else []
            for version in versions or [None]:
                with contextlib.suppress(AdapterError):  # logged by `find`
                    self.find(name, version)

    def list_unapproved(self, name: str) -> dict[str | None, str]:
        """Return the versions of an adapter that are not served because they lack an approval -> the reason.

        None stands for an adapter without versions. Empty where approval is not required.
        """
        found: dict[str | None, str] = {}
        versions: Sequence[str | None] = _list_versions(self._find(name)) or [None]
        for version in versions if self._require_approval else ():
            try:
                self.find(name, version)
            except ApprovalError as error:
                found[version] = str(error)
            except AdapterError:  # another reason, which a request is told
                continue
        return found

    def list_versions(self, name: str) -> list[str]:
        """Return the complete versions of an adapter, oldest first; empty for one without versions."""
        return _list_versions(self._find(name))

    def current_version(self, name: str) -> str | None:
        """Return the version that is served: the one set by a roll-back, else the newest, where required the newest approved one.

        Raises:
            AdapterError: there is no such adapter, or the version set by a roll-back is missing.
        """
        home = self._find(name)
        versions = _list_versions(home)
        if not versions:
            return None
        if not os.path.lexists(home / CURRENT_FILE):
            return self._find_newest(name, versions)
        try:
            check_file(home / CURRENT_FILE, _MAX_CURRENT_BYTES)
            pinned = (home / CURRENT_FILE).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(f"{home / CURRENT_FILE} cannot be read ({error}): set the version again.") from error
        if pinned not in versions:
            raise AdapterError(
                f"adapter {name!r} is set to version {pinned!r}, which is not there: expected one of {', '.join(versions)}; "
                "set one of them, or put the version back."
            )
        return pinned

    def _find_newest(self, name: str, versions: list[str]) -> str:
        """Return the newest version, where approval is required the newest approved one; the newest where none is."""
        for version in reversed(versions) if self._require_approval else ():
            try:
                self.find(name, version)
            except ApprovalError:
                continue
            except AdapterError:  # approved and refused for another reason, which the request is told
                return version
            return version
        return versions[-1]

    def find(self, name: str, version: str | None = None) -> ServedAdapter:
        """Return a version of an adapter; None: the current one.

        Raises:
            AdapterError: it is missing, incomplete, or made for another base, tokenizer or template.
            ApprovalError: it is not approved as it is now, and has to be.
        """
        home = self._find(name)
        versions = _list_versions(home)
        if version is None:
            version = self.current_version(name)
        elif version not in versions:
            there = ", ".join(versions) or "none, since it has no versions"
            raise AdapterError(f"adapter {name!r} has no version {version!r}: expected one of {there}.")
        folder = home / version if version else _find_unversioned(home)
        files = [folder / ADAPTER_WEIGHTS, folder / ADAPTER_CONFIG, folder / CONTRACT_FILE]
        files += [folder / name for name in (REFERENCE_FILE, PARITY_FILE) if (folder / name).exists()]
        if self._require_approval and (folder / APPROVALS_FILE).exists():
            files.append(folder / APPROVALS_FILE)
        try:
            stats = [file.stat() for file in files]
        except OSError as error:
            raise AdapterError(f"adapter {name!r} is incomplete ({error}): copy its folder again.") from error
        stamp = tuple(value for stat in stats for value in (stat.st_mtime_ns, stat.st_size, stat.st_ino))
        known = self._known.get(folder)
        if known is None or known[0] != stamp:
            known = self._known[folder] = (stamp, self._read(name, version, folder))
            if isinstance(known[1], AdapterError):  # once for each state of its files
                _logger.warning("Not served: %s", known[1])
            else:
                for notice in known[1].notices:
                    _logger.warning("Adapter %r: %s", name, notice)
        if isinstance(known[1], AdapterError):
            raise known[1].with_traceback(None)
        return known[1]

    def _read(self, name: str, version: str | None, folder: Path) -> ServedAdapter | AdapterError:
        """Read and check an adapter. A refusal is returned, not raised, so that it is cached like a good adapter."""
        try:
            contract = read_contract(folder)
            if self._require_approval and (refusal := judge_approvals(folder).refusal):
                which = f"{name!r}, version {version}," if version else repr(name)
                raise ApprovalError(f"adapter {which} is not approved, and this server requires it: {refusal}")
            contract.check(folder, self._base, self._base.template)
            check_adapter(folder)
            doubt = find_doubt(folder, contract, self._base.bits, self._min_agreement or 0.0)
            if doubt and self._min_agreement is not None:
                raise AdapterError(
                    f"adapter {name!r} is not shown to answer as it was trained, and this server requires it "
                    f"(min_agreement={self._min_agreement:g}): {doubt}."
                )
            digest = hash_adapter(folder)
            date = contract.choose_date(folder, self._base.template_date)
            tasks = read_tasks(folder, contract)
        except AdapterError as error:
            return error
        return ServedAdapter(
            name=name,
            version=version,
            folder=folder,
            hash=digest,
            contract=contract,
            template_date=date,
            tasks=tasks,
            references=_read_references(folder, contract),
            doubt=doubt,
        )

    def set_current(self, name: str, version: str | None) -> ServedAdapter:
        """Serve a version from now on, in every replica; None: the newest again.

        Raises:
            AdapterError: it is missing or does not fit; nothing changes then.
        """
        home = self._find(name)
        versions = _list_versions(home)
        if not versions:
            raise AdapterError(
                f"adapter {name!r} has no versions: expected folders {name}/v1, {name}/v2; there is nothing to choose."
            )
        adapter = self.find(name, version or self._find_newest(name, versions))
        if version is None:
            (home / CURRENT_FILE).unlink(missing_ok=True)
        else:
            temporary = home / f".{CURRENT_FILE}"
            temporary.write_text(f"{version}\n", encoding="utf-8")
            temporary.replace(home / CURRENT_FILE)
        return adapter

    def _find(self, name: str) -> Path:
        # The name comes from a request: only a plain folder name may reach the file system.
        if self._folder is None or not _NAME.fullmatch(name) or not (self._folder / name).is_dir():
            there = ", ".join(self.list_names()) or "none"
            raise AdapterError(f"there is no adapter {name!r}: expected one of {there}.")
        return self._folder / name


def _find_unversioned(home: Path) -> Path:
    """Return the folder of an adapter without versions: `home`, or `adapter` in it if `home` is a run folder."""
    is_run = not (home / CONTRACT_FILE).is_file() and (home / RUN_ADAPTER / CONTRACT_FILE).is_file()
    return home / RUN_ADAPTER if is_run else home


def _list_versions(home: Path) -> list[str]:
    if not home.is_dir():
        return []
    complete = [entry.name for entry in home.iterdir() if (entry / CONTRACT_FILE).is_file()]
    return sorted((name for name in complete if _VERSION.fullmatch(name)), key=lambda name: int(name[1:]))


def _read_references(folder: Path, contract: Contract) -> tuple[Reference, ...]:
    """Read an adapter's references. A damaged file costs the monitoring, not the answers."""
    try:
        return read_references(folder, contract.files.get(ADAPTER_WEIGHTS) or hash_file(folder / ADAPTER_WEIGHTS))
    except AdapterError as error:
        _logger.warning("Answers are not compared with the test split: %s", error)
        return ()
