"""Pairing of results with runs: which results count, and which are left out and why.

A run is known by its adapter: by the hash of its weights, or by its folder where results are older than the hashes. A base
alone is known by the fingerprint of its weights and the template of its prompts. Names are only shown; equal ones get a suffix.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import NamedTuple

from finlora.report.comparable import has_random_weights
from finlora.results import Result


@dataclass(frozen=True, slots=True)
class Run:
    """A trained adapter, or a base alone. Two runs of one report never have one name."""

    name: str
    base: str
    """Short name of the base."""
    variant: str
    """`base`, or as `4bit-r4`."""
    adapter_hash: str | None
    base_hash: str | None

    @property
    def is_base(self) -> bool:
        return self.variant == "base"

    @property
    def row(self) -> tuple[str, str]:
        """Return what names a row of a table: the run, and what it is made of."""
        return (
            ("base", self.name.removeprefix("base ")) if self.is_base else (self.name, f"{self.base}, {self.variant}")
        )


class Kept(NamedTuple):
    """A result that counts."""

    run: Run
    result: Result


class LeftOut(NamedTuple):
    """A result that does not count."""

    run: Run
    result: Result
    why: str
    is_stale: bool
    """Whether it measures an earlier adapter, which the run has since replaced."""


@dataclass(frozen=True, slots=True)
class Paired:
    """Results by their runs."""

    kept: tuple[Kept, ...]
    left_out: tuple[LeftOut, ...]

    def base_of(self, run: Run, like: Result) -> Result | None:
        """Return the score of a run's base on the same questions, at the same bits and by the same method."""
        return next(
            (
                result
                for other, result in self.kept
                if other.is_base
                and (other.base, other.base_hash) == (run.base, run.base_hash)
                and result.kind == "evaluation"
                and _measurement(result) == _measurement(like)
                and (result.data_hash, template_of(result)) == (like.data_hash, template_of(like))
            ),
            None,
        )


def pair_results(results: Sequence[Result]) -> Paired:
    """Sort results by run, in order of first appearance.

    Of several measurements of one kind the newest full one counts; of two with the same time, the later line. If a run was
    trained again, only the results of its newest adapter count.
    """
    bases = _key_bases(results)
    keys = _key_runs(results, bases)
    runs = _name_runs(results, keys, bases)
    current = _current_adapters(results, keys)
    chosen: dict[tuple[Hashable, ...], Result] = {}
    stale: set[int] = set()
    for result, key in zip(results, keys, strict=True):
        if result.adapter_hash is not None and current[key] not in (None, result.adapter_hash):
            stale.add(id(result))
            continue
        measurement = (key, *_measurement(result))
        before = chosen.get(measurement)
        if before is None or _rank(result) >= _rank(before):
            chosen[measurement] = result
    kept = [
        Kept(runs[key], chosen[key, *_measurement(result)])
        for result, key in _firsts(zip(results, keys, strict=True), stale)
    ]
    used = {id(each.result) for each in kept}
    left_out = []
    for result, key in zip(results, keys, strict=True):
        if id(result) in stale:
            why = f"of an earlier adapter of this run ({short(result.adapter_hash)}), which was trained again"
            left_out.append(LeftOut(runs[key], result, why, True))
        elif id(result) not in used:
            why = _explain(result, chosen[key, *_measurement(result)])
            left_out.append(LeftOut(runs[key], result, why, False))
    return Paired(tuple(kept), tuple(left_out))


def name_base(result: Result) -> str:
    """Return the base's short name: the last part of a hub id or folder, with a mark for random weights."""
    name = result.base.rstrip("/").rpartition("/")[2] or result.base
    return f"{name} (random weights)" if has_random_weights(result) else name


def short(digest: str | None) -> str:
    """Return the first 12 digits of a hash."""
    return digest[:12] if digest else "not recorded"


def template_of(result: Result) -> str:
    """Return how prompts were put: `raw`, or `chat` with the date of its template where one was set."""
    model = result.config.get("model")
    if not isinstance(model, dict):
        return "raw"
    date = model.get("template_date")
    return f"{model.get('template', 'raw')}{f' of {date}' if date else ''}"


def _measurement(result: Result) -> tuple[Hashable, ...]:
    method = result.method if result.kind == "evaluation" else None
    return result.kind, result.task, result.bits, method


def _rank(result: Result) -> tuple[bool, str]:
    return not result.is_partial, result.created


def _firsts(pairs: Iterable[tuple[Result, Hashable]], stale: set[int]) -> Iterable[tuple[Result, Hashable]]:
    seen = set()
    for result, key in pairs:
        measurement = (key, *_measurement(result))
        if id(result) not in stale and measurement not in seen:
            seen.add(measurement)
            yield result, key


def _explain(older: Result, newer: Result) -> str:
    if older.is_partial and not newer.is_partial:
        return f"partial, beside a full one of {newer.created or 'unknown time'}"
    other = " on another test split" if older.data_hash != newer.data_hash else ""
    return f"superseded by that of {newer.created or 'a later line'}{other}"


def _key_bases(results: Sequence[Result]) -> list[Hashable]:
    """Return what tells each result's base from others: its fingerprint, else its name or folder."""
    known: dict[str, set[str]] = {}
    for result in results:
        if result.base_hash:
            known.setdefault(result.base, set()).add(result.base_hash)

    def key(result: Result) -> Hashable:
        if has_random_weights(result):
            return "random", result.base
        hashes = known.get(result.base, set())
        return result.base_hash or (next(iter(hashes)) if len(hashes) == 1 else ("named", result.base))

    return [key(result) for result in results]


def _key_runs(results: Sequence[Result], bases: Sequence[Hashable]) -> list[Hashable]:
    """Return what tells each result's run from others: where it was trained, or the base and template."""
    trained: dict[str, list[str]] = {}
    for result in results:
        if result.kind == "training" and result.adapter_hash:
            trained.setdefault(result.adapter_hash, []).append(_folder_of(result))

    def key(result: Result, base: Hashable) -> Hashable:
        if result.variant == "base":
            return "base", base, template_of(result)
        folder = _folder_of(result)
        # An adapter that was copied elsewhere is still that of its run.
        folders = trained.get(result.adapter_hash or "", [])
        run = folder if folder in folders or not folders else folders[0]
        return "run", run, "" if run else (result.variant, base)

    return [key(result, base) for result, base in zip(results, bases, strict=True)]


def _folder_of(result: Result) -> str:
    """Return the folder of the adapter; empty where the result does not tell."""
    if result.adapter:
        return str(PurePath(result.adapter))
    if "output_dir" in result.config and "name" in result.config:
        return str(PurePath(str(result.config["output_dir"])) / str(result.config["name"]) / "adapter")
    return ""


def _current_adapters(results: Sequence[Result], keys: Sequence[Hashable]) -> dict[Hashable, str | None]:
    """Return the hash of each run's newest adapter: that of its last training, else of its last evaluation."""
    newest: dict[Hashable, tuple[bool, str]] = {}
    current: dict[Hashable, str | None] = dict.fromkeys(keys)
    for result, key in zip(results, keys, strict=True):
        rank = (result.kind == "training", result.created)
        if result.adapter_hash and rank >= newest.get(key, (False, "")):
            newest[key], current[key] = rank, result.adapter_hash
    return current


def _name_runs(results: Sequence[Result], keys: Sequence[Hashable], bases: Sequence[Hashable]) -> dict[Hashable, Run]:
    grouped: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        grouped.setdefault(key, []).append(index)
    current = _current_adapters(results, keys)
    base_hashes = {base: result.base_hash for base, result in zip(bases, results, strict=True) if result.base_hash}
    base_names = _tell_apart(
        {
            base: (name_base(result), result.base, base_hashes.get(base))
            for base, result in zip(bases, results, strict=True)
        }
    )
    wanted: dict[Hashable, tuple[str, str, str | None]] = {}
    for key, indices in grouped.items():
        own = [results[index] for index in indices]
        first = next((result for result in own if result.kind == "training"), own[0])
        if first.variant == "base":
            template = template_of(first)
            mark = "" if template == "raw" else f", {template} template"
            wanted[key] = (f"base {base_names[bases[indices[0]]]}{mark}", first.base, first.base_hash)
        else:
            name, folder = _name_of(first), PurePath(_folder_of(first)).parent
            wanted[key] = (name, str(folder.parent if folder.name == name else folder), current[key])
    names = _tell_apart(wanted)
    return {
        key: Run(
            name=names[key],
            base=base_names[bases[indices[0]]],
            variant=results[indices[0]].variant,
            adapter_hash=current[key],
            base_hash=base_hashes.get(bases[indices[0]]),
        )
        for key, indices in grouped.items()
    }


def _name_of(result: Result) -> str:
    name = result.run or result.config.get("name") or PurePath(_folder_of(result)).parent.name
    return str(name or result.variant)


def _tell_apart(wanted: Mapping[Hashable, tuple[str, str, str | None]]) -> dict[Hashable, str]:
    """Return a name for each key: the wanted one, with the end of its folder, or its hash, where others have the same."""
    by_name: dict[str, list[Hashable]] = {}
    for key, (name, _, _) in wanted.items():
        by_name.setdefault(name, []).append(key)
    names: dict[Hashable, str] = {}
    for name, keys in by_name.items():
        if len(keys) == 1:
            names[keys[0]] = name
            continue
        marks = _shortest_ends([PurePath(wanted[key][1]) for key in keys])
        if marks is None:
            marks = [short(wanted[key][2]) for key in keys]
        if len(set(marks)) < len(marks):
            marks = [f"{mark}, {number}" for number, mark in enumerate(marks, start=1)]
        names |= {key: f"{name} ({mark})" for key, mark in zip(keys, marks, strict=True)}
    return names


def _shortest_ends(paths: Sequence[PurePath]) -> list[str] | None:
    """Return the fewest last parts by which paths differ from one another; None where some are equal."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        ends = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(ends)) == len(ends):
            return ends
    return None
