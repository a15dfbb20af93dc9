"""Findings about a config's inputs: base, template, prepared rows. Reads files of this machine; needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from finlora.config import ModelConfig, RunConfig
from finlora.data.example import Example
from finlora.doctor.checks import Finding, fault, from_error, ok, warn
from finlora.errors import DatasetError, FinloraError, counted
from finlora.machine.model_hub import find_hub_problem, hub_host, is_behind_proxy, is_offline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from finlora.model.base_files import BaseFiles

_SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
MAX_ROWS = 2000
"""Rows of a split that are encoded, spread evenly."""


def check_hub(model: ModelConfig | None) -> Iterator[Finding]:
    """Check that the hub answers, unless it is not used."""
    if model is not None and Path(model.base).expanduser().is_dir():
        yield ok("hub", f"not needed: model.base={model.base} is a folder")
        return
    if is_offline():
        yield ok("hub", "not checked, since HF_HUB_OFFLINE is set: bases come from folders and the local cache")
    elif is_behind_proxy():
        yield ok("hub", f"{hub_host()} is behind the proxy of https_proxy, so it was not checked")
    elif problem := find_hub_problem():
        advice = "mirror bases where it does (`finlora prefetch`), and set HF_HUB_OFFLINE=1 here"
        yield warn("hub", problem, advice)
    else:
        yield ok("hub", f"{hub_host()} answers")


def check_base(model: ModelConfig) -> tuple[list[Finding], BaseFiles | None]:
    """Check the files of the base, its tokenizer and its chat template; returns findings and the base, None if it has a fault."""
    from finlora.model.base_files import read_base_files

    try:
        base = read_base_files(model)
    except FinloraError as error:
        return [from_error("base", error)], None
    shards = set(base.source.shards.values())
    size = sum(path.stat().st_size for path in shards) / 2**30
    date = f", dated {base.template_date}" if base.template_date else ""
    found = [
        ok("base", f"{model.base}: {counted(len(shards), 'file')}, {size:.2f} GiB, headers valid, with its tokenizer"),
        ok("template", f"chat, as the tokenizer has it{date}" if model.template == "chat" else "raw: none is needed"),
    ]
    return found, base


def check_data(config: RunConfig, base: BaseFiles | None) -> Iterator[Finding]:
    """Check the prepared splits of the config's tasks: complete, with answers, within model.max_seq_len.

    Args:
        base: None skips the check of lengths.
    """
    from finlora.data.sets.prepared import read_prepared

    for task in config.data.tasks:
        for split in _SPLITS:
            name = f"{task} {split}"
            try:
                rows = read_prepared(Path(config.data.dir), task, split).examples
                yield from check_rows(name, rows)
                if base is not None:
                    yield check_lengths(name, rows, base.tokenizer, config, base.template_date)
            except FinloraError as error:
                yield from_error(name, error)


def check_rows(name: str, rows: Sequence[Example]) -> Iterator[Finding]:
    """Find rows without an answer, and so without a label token, or with an answer that is not allowed."""
    empty = [row for row in rows if not row.answer.strip()]
    other = [row for row in rows if row.choices and row.answer.strip() and row.answer not in row.choices]
    if empty:
        yield fault(
            name,
            f"{len(empty):,} of {len(rows):,} rows have no label token, first {empty[0].id} ({empty[0].source})",
            "correct the raw file and prepare it again",
            DatasetError,
        )
    if other:
        yield fault(
            name,
            f"{len(other):,} of {len(rows):,} rows have an answer that is not one of their choices, first {other[0].id} "
            f"({other[0].source})",
            "correct the raw file and prepare it again",
            DatasetError,
        )
    if not empty and not other:
        yield ok(name, f"{counted(len(rows), 'row')}, each with a label token")


def check_lengths(
    name: str, rows: Sequence[Example], tokenizer: PreTrainedTokenizerFast, config: RunConfig, date: str | None
) -> Finding:
    """Find rows over model.max_seq_len, among all rows or an evenly spread part."""
    from finlora.data.encode import encode_answer, encode_asked

    step = -(-len(rows) // MAX_ROWS)
    looked = rows[::step]
    template, limit = config.model.template, config.model.max_seq_len
    lengths = [
        len(encode_asked(row, tokenizer, template, date)) + len(encode_answer(row.answer, tokenizer, template))
        for row in looked
    ]
    part = f"{len(looked):,} of {len(rows):,} rows checked" if step > 1 else f"all {len(rows):,} rows"
    over = sum(length > limit for length in lengths)
    if not over:
        return ok(name, f"longest {max(lengths):,} of {limit:,} tokens ({part})")
    found = f"{over:,} rows are longer than model.max_seq_len={limit:,}, up to {max(lengths):,} tokens ({part})"
    if config.data.too_long == "skip":
        return warn(name, found, "data.too_long=skip leaves them out")
    return fault(name, found, f"set model.max_seq_len={max(lengths)}, or data.too_long=skip", DatasetError)
