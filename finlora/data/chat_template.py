"""Rendering of chat templates with a fixed date and without thinking, so that the prompt is the same on every day.

The templates of Llama 3.2 and 3.3 write today's date: transformers gives them a function `strftime_now`. Here a macro of that
name, put in front of the template, hides the function and returns one fixed day.

Templates of Qwen 3 and SmolLM3 ask for a chain of thought unless `enable_thinking` is false. Here it always is: an adapter learns
the answer itself, and a label is scored right after the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from finlora.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DEFAULT_DATE = "2024-07-26"
"""Default date: the one that the templates of Llama 3.1 to 3.3 write where there is no clock.
Source: chat_template of tokenizer_config.json, https://huggingface.co/meta-llama/Llama-3.2-1B-Instruct."""
_THINKING = "enable_thinking"
_DATE_STRING = "%d %b %Y"
"""Format of the variable `date_string`, which Llama 3's templates use instead of the clock if it is set."""


@dataclass(frozen=True, slots=True)
class _Inputs:
    """How a template obtains its date, and whether it can turn thinking off."""

    formats: tuple[str, ...]
    """Formats in which it asks the clock; empty: it does not."""
    takes_date: bool
    """It uses the variable `date_string`."""
    takes_thinking: bool
    """It uses the variable `enable_thinking`."""


def choose_date(tokenizer: PreTrainedTokenizerFast, template: Literal["raw", "chat"], wanted: str | None) -> str | None:
    """Return the date, such as 2024-07-26, that the template writes into each prompt; None: it writes none, or a fixed one.

    Args:
        wanted: `model.template_date`; None: DEFAULT_DATE if the template would ask the clock.

    Raises:
        ModelError: there is no template, it cannot be read, or `wanted` is set and it takes no date.
    """
    if template == "raw":
        return None
    inputs = _find_inputs(_template_of(tokenizer))
    if inputs.formats:
        return wanted or DEFAULT_DATE
    if wanted is not None and not inputs.takes_date:
        raise ModelError(
            f"model.template_date={wanted}, but the tokenizer's chat template writes no date: leave the setting out."
        )
    return wanted


def render_turns(turns: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerFast, date: str | None) -> str:
    """Render a conversation up to the assistant's next turn. Only this function applies a chat template.

    Args:
        turns: each with `role` and `content`.
        date: from `choose_date`.

    Raises:
        ModelError: there is no template, or it refuses these turns.
    """
    from jinja2 import TemplateError

    template = _template_of(tokenizer)
    inputs = _find_inputs(template)
    given: dict[str, str | bool] = {_THINKING: False} if inputs.takes_thinking else {}
    if date is not None and inputs.takes_date:
        given["date_string"] = _format(date, _DATE_STRING)
    try:
        text = tokenizer.apply_chat_template(
            [dict(turn) for turn in turns],
            chat_template=_fix(template, inputs.formats, date or DEFAULT_DATE),
            add_generation_prompt=True,
            tokenize=False,
            **given,
        )
    except TemplateError as error:
        raise ModelError(f"the tokenizer's chat template refuses these turns: {error}") from error
    return str(text)


def fix_inputs(tokenizer: PreTrainedTokenizerFast, date: str | None) -> None:
    """Write a date into the tokenizer's template, and that thinking is off, for a folder that other programs read."""
    if tokenizer.chat_template is None:
        return
    template = fixed = _template_of(tokenizer)
    inputs = _find_inputs(template)
    if date is not None:
        fixed = _fix(template, inputs.formats, date)
        if not inputs.formats:
            fixed = f"{{% set date_string = {json.dumps(_format(date, _DATE_STRING))} %}}\n{template}"
    if inputs.takes_thinking:
        fixed = f"{{% set {_THINKING} = false %}}\n{fixed}"
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = {**tokenizer.chat_template, "default": fixed}
    else:
        tokenizer.chat_template = fixed


def _template_of(tokenizer: PreTrainedTokenizerFast) -> str:
    where = tokenizer.name_or_path or "the tokenizer"
    if tokenizer.chat_template is None:
        raise ModelError(
            f"model.template=chat, but the tokenizer has no chat template: {where} has none in tokenizer_config.json and no "
            "chat_template.jinja. Copy the file from where the model came from (`finlora prefetch` fetches it), take a model "
            "that has one, as instruct models do, or set model.template=raw."
        )
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ModelError(
            f"{where} has several chat templates, none of them named `default`: rename one, or set model.template=raw."
        ) from error


@lru_cache(maxsize=64)
def _find_inputs(template: str) -> _Inputs:
    from jinja2 import Environment, TemplateSyntaxError, meta, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """transformers' tag that marks the assistant's text."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # Parses only; renders nothing.
    environment = Environment(extensions=["jinja2.ext.loopcontrols", Generation])
    try:
        tree = environment.parse(template)
    except TemplateSyntaxError as error:
        raise ModelError(f"the tokenizer's chat template cannot be read ({error}): copy the model again.") from error
    names = meta.find_undeclared_variables(tree)
    if "strftime_now" not in names:
        return _Inputs((), takes_date="date_string" in names, takes_thinking=_THINKING in names)
    clock = "strftime_now"
    calls = [
        node for node in tree.find_all(nodes.Call) if isinstance(node.node, nodes.Name) and node.node.name == clock
    ]
    formats = [node.args[0].value for node in calls if len(node.args) == 1 and isinstance(node.args[0], nodes.Const)]
    tests = [
        node for node in tree.find_all(nodes.Test) if isinstance(node.node, nodes.Name) and node.node.name == clock
    ]
    uses = sum(node.name == clock for node in tree.find_all(nodes.Name))
    if len(formats) < len(calls) or uses > len(calls) + len(tests):
        raise ModelError(
            "the tokenizer's chat template computes the format of today's date while it runs, so the date cannot be fixed: write "
            "the format into its call of strftime_now, or set model.template=raw."
        )
    unique = tuple(dict.fromkeys(map(str, formats)))
    return _Inputs(unique, takes_date="date_string" in names, takes_thinking=_THINKING in names)


def _fix(template: str, formats: Sequence[str], date: str) -> str:
    """Return the template after a macro that gives the date in each format it asks for; the end tag swallows the line break."""
    if not formats:
        return template
    cases = "".join(
        f"{{% {'elif' if index else 'if'} format == {json.dumps(form)} %}}{{{{ {json.dumps(_format(date, form))} }}}}"
        for index, form in enumerate(formats)
    )
    return f"{{% macro strftime_now(format) %}}{cases}{{% endif %}}{{% endmacro %}}\n{template}"


def _format(date: str, form: str) -> str:
    return datetime.fromisoformat(date).strftime(form)
