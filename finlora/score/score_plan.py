"""Plan of a scoring: all that an engine needs to score a part, and the binding of the parts to inputs and settings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from finlora.config import RunConfig
from finlora.data.question import PLAIN, Form
from finlora.data.sets.catalog import FORMS, task_named
from finlora.errors import ConfigError, counted
from finlora.inference.ask import list_own_forms
from finlora.model.adapter_files import hash_weights_and_settings
from finlora.model.base_files import BaseFiles
from finlora.model.contract import read_contract
from finlora.precision import resolve_evaluation
from finlora.score.table import Table


class ScoreColumn(NamedTuple):
    """A column that is added to the table."""

    key: str
    """Key of the value in a result. The column's name is the plan's prefix and this key."""
    kind: Literal["text", "number", "position", "flag"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorePlan:
    """Question about each row, and the model that answers it."""

    config: RunConfig
    adapter: Path | None
    date: str | None
    """Date for the chat template, as in `encode_prompt`."""
    task: str | None
    """None: the text is the whole prompt."""
    form: Form
    """Form of the task's prompt. Adapters and prepared data bring the forms of task files."""
    text: str
    """Column of the text."""
    about: str | None
    """Column of the entity or question that the task asks about."""
    threshold: float | None
    """Least probability of a label; below it the row abstains. None: no row does."""
    prefix: str
    """Prefix of the added columns' names."""
    table: Table
    unknown: str
    """What is unknown of an adopted adapter; empty: nothing."""
    binding: dict[str, Any]
    """Inputs and settings that must be equal for a run to resume from the parts of an earlier one."""

    @property
    def read_columns(self) -> list[str]:
        """Columns of the table that the prompt needs."""
        return [self.text, *([self.about] if self.about else [])]

    @property
    def columns(self) -> dict[str, ScoreColumn]:
        """Added columns by name, in their order."""
        if self.form.choices:
            found = [ScoreColumn("label", "text"), ScoreColumn("probability", "number")]
            if self.threshold is not None:
                found.append(ScoreColumn("abstained", "flag"))
            found += [ScoreColumn(f"p_{choice}", "number") for choice in self.form.choices]
        else:
            found = [ScoreColumn("answer", "text")]
            if self.form.is_quoted:
                found += [ScoreColumn("quote_start", "position"), ScoreColumn("quote_end", "position")]
        found.append(ScoreColumn("reason", "text"))
        return {f"{self.prefix}_{column.key}": column for column in found}


def make_plan(
    config: RunConfig,
    base: BaseFiles,
    adapter: Path | None,
    table: Table,
    *,
    task: str | None,
    text: str | None,
    about: str | None,
    threshold: float | None,
) -> ScorePlan:
    """Return the plan, with task, columns and adapter checked against the table and the base. Needs no GPU.

    Raises:
        ConfigError: the task cannot be asked, a column is missing, or the table has a column with the name of an added one.
        AdapterError: the adapter is incomplete or was made for another base, tokenizer or template.
    """
    config = resolve_evaluation(config)
    forms = {**FORMS, **list_own_forms(task, adapter, Path(config.data.dir), base)}
    if task is not None and task not in forms:
        task_named(task)  # raises with similar names
        raise ConfigError(f"task {task!r} cannot be asked: expected one of {', '.join(forms)}.")
    form = forms[task] if task else PLAIN
    if threshold is not None and not form.choices:
        raise ConfigError(f"--threshold is for labels, and {task or 'a plain prompt'} is answered in free text.")
    if threshold is not None and not 0 < threshold < 1:
        raise ConfigError(f"found --threshold {threshold:g}: expected a probability between 0 and 1.")
    column = _choose_text(table, text)
    if form.about == "none" and about:
        raise ConfigError(f"{task or 'a plain prompt'} asks nothing beside the text: leave --about out.")
    if form.about != "none" and not about:
        raise ConfigError(
            f"{task} asks about one {form.about} of each text: name the column that holds it with --about."
        )
    if about and about not in table.columns:
        raise ConfigError(f"found no column {about!r}: expected one of {', '.join(table.columns)}.")
    contract = read_contract(adapter) if adapter else None
    date = base.check_adapter(adapter, contract) if adapter and contract else base.template_date
    settings = {
        "task": task,
        "prompt": _hash_prompt(form),
        "text": column,
        "about": about,
        "threshold": threshold,
        "base": base.weights_hash,
        "bits": config.eval.bits or config.model.bits,
        "adapter": hash_weights_and_settings(adapter) if adapter else None,
        "template": config.model.template,
        "date": date,
        "compute_dtype": config.model.compute_dtype,
        "device": config.eval.device,
        "num_stages": config.eval.num_stages,
        "batch_size": config.eval.batch_size,
        "max_new_tokens": config.eval.max_new_tokens,
        "max_seq_len": config.model.max_seq_len,
        "part_rows": max(part.num_rows for part in table.parts),
        "files": {file.path.name: file.sha256 for file in table.files},
    }
    plan = ScorePlan(
        config=config,
        adapter=adapter,
        date=date,
        task=task,
        form=form,
        text=column,
        about=about,
        threshold=threshold,
        prefix=task or "finlora",
        table=table,
        unknown=contract.describe_unknown() if contract else "",
        binding=settings,
    )
    if clashing := [name for name in plan.columns if name in table.columns]:
        raise ConfigError(
            f"the table has a column {clashing[0]!r} already, and the scores of {task or 'a plain prompt'} add one: rename it."
        )
    return plan


def describe_plan(plan: ScorePlan) -> str:
    """Return the plan as one sentence."""
    table = plan.table
    subject = "the base model" if plan.adapter is None else f"adapter {plan.adapter}"
    asked = f"task {plan.task}" if plan.task else "the text alone"
    columns = plan.text + (f" and {plan.about}" if plan.about else "")
    return (
        f"Scoring {counted(table.num_rows, 'row')} in {counted(len(table.files), 'file')} and "
        f"{counted(len(table.parts), 'part')}: {asked}, column {columns}, {subject} on "
        f"{plan.config.model.base} at {plan.config.eval.bits or plan.config.model.bits} bit ({plan.config.eval.device})"
        + (f". {plan.unknown}" if plan.unknown else "")
    )


def describe_difference(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """Return the settings in which two bindings differ, with both values; None: they are equal."""
    names = [name for name in wanted if json.dumps(found.get(name)) != json.dumps(wanted[name])]
    return "; ".join(f"{name} {_shorten(found.get(name))}, now {_shorten(wanted[name])}" for name in names) or None


def _choose_text(table: Table, text: str | None) -> str:
    if text is None:
        if "text" in table.columns:
            return "text"
        if len(table.columns) == 1:
            return table.columns[0]
        raise ConfigError(
            f"found no column 'text': name the column that is asked about with --text: {', '.join(table.columns)}."
        )
    if text not in table.columns:
        raise ConfigError(f"found no column {text!r}: expected one of {', '.join(table.columns)}.")
    return text


def _hash_prompt(form: Form) -> str:
    """Return a hash that changes with the instruction and the labels."""
    about = form.about_values[0] if form.about_values else "ABOUT"
    words = json.dumps([form.render("TEXT", "" if form.about == "none" else about), form.choices])
    return hashlib.sha256(words.encode()).hexdigest()


def _shorten(value: Any) -> str:
    if value is None:
        return "none"
    text = value[:16] if isinstance(value, str) and len(value) == 64 else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
