"""Reference pages from the code: settings, commands, HTTP endpoints, metrics and errors, each text written once.

    python docs/generate.py             # writes docs/reference/*.md
    python docs/generate.py --check     # writes nothing; exit code 1 where a page differs from the code

A test runs the check. The text of a setting is the string under its field, that of an option its help, that of an endpoint its
docstring and the descriptions of its fields, that of an error its docstring.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

FOLDER = Path(__file__).resolve().parent / "reference"
COMMAND = "python docs/generate.py"
_NOTE = f"<!-- Generated from the code by `{COMMAND}`: change the text there. -->\n"
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}


def clean(text: str) -> str:
    """Return a text of the code on one line of Markdown: `None` as YAML writes it, signs of tables and tags escaped."""
    spans = re.split(r"(`[^`]*`)", " ".join(text.split()))
    for index, span in enumerate(spans):
        if not span.startswith("`"):
            spans[index] = re.sub(r"\bNone\b", "null", span.replace("<", "&lt;").replace("*", "\\*"))
    return "".join(spans).replace("|", "\\|")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def page(title: str, *parts: str) -> str:
    return "\n".join([_NOTE + f"# {title}\n", *(part.rstrip("\n") + "\n" for part in parts)])


def code(value: str) -> str:
    return f"`{value}`".replace("|", "\\|")


# Settings: dataclasses with a string under each field.


def texts_of(cls: type) -> dict[str, str]:
    """Return field -> the string under it.

    Raises:
        LookupError: a field has none.
    """
    (body,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            found[field.target.id] = str(ast.literal_eval(text.value))
    sections = {field.name for field in dataclasses.fields(cls) if is_section(typing.get_type_hints(cls)[field.name])}
    if missing := {field.name for field in dataclasses.fields(cls)} - set(found) - sections:
        raise LookupError(f"{cls.__name__}: no string follows {', '.join(sorted(missing))}")
    return found


def is_section(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint)


def describe_type(hint: Any) -> str:
    """Return a type in words: choices, `list of ...`, `... or null`."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(code(str(part)) for part in parts)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("null" if part is type(None) else describe_type(part) for part in parts)
    if is_section(hint):
        return "section, see below"
    if origin in (tuple, list):
        if is_section(parts[0]):
            return "list of sections, see below"
        inner = describe_type(parts[0])
        return "list of " + (f"{inner}s" if inner in ("text", "integer", "number") else inner)
    if origin is dict:
        return f"keys, each with a value: {describe_type(parts[1])}"
    raise LookupError(f"no words for the type {hint}")


def show_value(value: Any) -> str:
    if isinstance(value, float):
        return code(repr(value))
    text = yaml.safe_dump(list(value) if isinstance(value, tuple) else value, default_flow_style=True, width=1000)
    return code(text.removesuffix("\n").removesuffix("\n..."))


def settings_table(cls: type, prefix: str) -> str:
    hints, texts = typing.get_type_hints(cls), texts_of(cls)
    return table(
        ("setting", "type", "default", "meaning"),
        (
            (
                code(prefix + field.name.removesuffix("_")),  # a name that Python keeps for itself
                describe_type(hints[field.name]),
                _default_of(field),
                clean(texts[field.name]),
            )
            for field in dataclasses.fields(cls)
            if not is_section(hints[field.name])
        ),
    )


def _default_of(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        return show_value(field.default_factory())
    return "required" if field.default is dataclasses.MISSING else show_value(field.default)


def settings_sections(cls: type, prefix: str = "") -> list[str]:
    """Return a table of a class's own settings, then one of each section."""
    hints = typing.get_type_hints(cls)
    parts = [settings_table(cls, prefix)]
    for field in dataclasses.fields(cls):
        if is_section(section := hints[field.name]):
            parts += [f"## {prefix}{field.name}", settings_table(section, f"{prefix}{field.name}.")]
    return parts


def make_config() -> str:
    from finlora.config import RunConfig
    from finlora.model.pretrain import PretrainConfig
    from finlora.train.search.space import SearchConfig

    return page(
        "Run settings",
        "`plan`, `train`, `tune`, `evaluate`, `ask` and `merge` read these settings from a YAML file (`--config`) and from "
        "`key=value` words after it, which win. A section of the YAML is a section here: `model.bits` is the key `bits` under "
        "`model:`. `null` in YAML means what the last column says. An unknown key, a wrong type and a value out of range are "
        "all reported at once, with exit code 2. `finlora plan` shows what a run with these settings needs.",
        *settings_sections(RunConfig),
        "## search",
        "`finlora tune` reads this section beside the others. See [Search for good settings](../how-to/search.md).",
        settings_table(SearchConfig, "search."),
        "## Pretraining",
        "`finlora pretrain` takes these as `key=value` words. It reads no YAML file.",
        settings_table(PretrainConfig, ""),
    )


def make_serve_config() -> str:
    from finlora.serve.settings import ServeConfig

    return page(
        "Server settings",
        "These settings are the `args` of the application in a Serve YAML (`serve_configs/`). `finlora serve` also takes them as "
        "`key=value` words. Host, port and certificate of Ray Serve's proxy are in the same file under `http_options`, the "
        "number of copies under `deployments`. `finlora serve --config FILE --dry-run` checks a file.",
        *settings_sections(ServeConfig),
    )


def make_task_file() -> str:
    from finlora.data.taskfile.record import Label, Shot, TaskFile

    return page(
        "Task file",
        "A task file describes a table of your own and the question to it, in YAML. `finlora new-task TABLE` writes a first "
        "one, and `finlora prepare --task-file FILE` reads it; from then on the task's name works in `plan`, `train`, `tune`, "
        "`evaluate`, `ask`, `serve` and `report`. [Train on your own table](../how-to/own-table.md) shows the way. An unknown "
        "key, a wrong type and keys that contradict each other are reported at once, with exit code 2. Texts that YAML reads as "
        'something else need quotes: `"Yes"`, `"No"`, `"null"`, dates.',
        *settings_sections(TaskFile),
        "## labels[]",
        'A label can be written as its value alone: `labels: ["up", "down"]`.',
        settings_table(Label, "labels[]."),
        "## prompt.example",
        settings_table(Shot, "prompt.example."),
    )


# Commands: Typer's application.


def make_commands() -> str:
    import typer.main

    from finlora.cli.main import app

    group = typer.main.get_command(app)
    parts = [
        "Each verb's own `--help` shows the same. `[KEY=VALUE]...` are [run settings](config.md) over the YAML file, for `serve` "
        "[server settings](serve-config.md). Exit codes: [Errors](errors.md)."
    ]
    names = group.list_commands(None)  # type: ignore[attr-defined, arg-type]
    parts.append(table(("verb", "what it does"), ((f"[{name}](#{name})", _first_line(group, name)) for name in names)))
    for name in names:
        verb = group.commands[name]  # type: ignore[attr-defined]
        positional = " ".join(_metavar(each) for each in verb.params if each.param_type_name == "argument")
        parts += [
            f"## {name}",
            clean(verb.help or ""),
            f"Usage: `{' '.join(f'finlora {name} [OPTIONS] {positional}'.split())}`",
        ]
        parts.append(table(("argument or option", "type", "default", "meaning"), map(_parameter_row, verb.params)))
        examples = [line.strip() for line in (verb.epilog or "").splitlines() if line.startswith("  ")]
        parts.append("\n".join(["Examples:" if len(examples) > 1 else "Example:", "", *(f"    {e}" for e in examples)]))
    return page("Commands", *parts)


def _first_line(group: Any, name: str) -> str:
    return clean(group.commands[name].help or "")


def _metavar(parameter: Any) -> str:
    return parameter.metavar or parameter.name.upper()


def _parameter_row(parameter: Any) -> tuple[str, str, str, str]:
    if parameter.param_type_name == "argument":
        name = code(_metavar(parameter))
    else:
        name = ", ".join(code(option) for option in sorted(parameter.opts, key=len, reverse=True))
    if not getattr(parameter, "help", None):
        raise LookupError(f"{parameter.name} has no help")
    default = "required" if parameter.required else parameter.default
    shown = "" if default in (None, False, "") or callable(default) else str(default)
    return (
        name,
        _kind(parameter),
        shown if shown == "required" else (code(shown) if shown else ""),
        clean(parameter.help),
    )


def _kind(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "flag"
    name = describe_type(parameter.type_descriptor.annotation)
    low, high = getattr(parameter, "min", None), getattr(parameter, "max", None)
    if low is None:
        return name
    return f"{name}, {low} to {high}" if high is not None else f"{name}, at least {low}"


# Metrics and errors.


def make_metrics() -> str:
    from finlora.serve.accounts import prometheus
    from finlora.train.run.recorder import PUBLISHED

    serving = []
    for call in ast.walk(ast.parse(inspect.getsource(prometheus))):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("Counter", "Gauge", "Histogram"):
            name, text = (ast.literal_eval(part) for part in call.args[:2])
            tags = next((ast.literal_eval(part) for part in call.args[2:] if isinstance(part, ast.Tuple)), ())
            serving.append((code(name), call.func.id.lower(), ", ".join(map(code, tags)), clean(text)))
    return page(
        "Metrics",
        "Ray exports these metrics for Prometheus, beside its own and Ray Serve's. The port is that of Ray's metrics "
        "(`--metrics-export-port` of `ray start`); Ray puts `ray_` in front of each name. "
        "`serve_configs/grafana-dashboard.json` is a Grafana dashboard of them, `serve_configs/prometheus-alerts.yml` alerts.",
        "## Serving",
        "`adapter` is `base` for the base alone; `version` is empty for an adapter without versions. What the metrics of labels "
        "mean, and their window: [Monitor a served adapter](../how-to/monitor.md).",
        table(("metric", "kind", "labels", "meaning"), serving),
        "## Training",
        table(
            ("metric", "kind", "labels", "meaning"),
            (
                (code(f"finlora_train_{name}"), "gauge", "`run`, `worker`", clean(text))
                for name, text in PUBLISHED.items()
            ),
        ),
    )


def make_errors() -> str:
    from finlora import errors
    from finlora.serve import failures

    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if kind.__module__ == errors.__name__]
    kinds.sort(key=lambda kind: (kind.exit_code, len(kind.__mro__)))
    return page(
        "Errors and exit codes",
        "Each error of FinLoRA says what was found, what was expected and what to do. A command ends with its exit code, a "
        "server answers with its HTTP status. `finlora/errors.py` holds the classes.",
        "## Error classes",
        table(
            ("error", "a kind of", "exit code", "HTTP status and `code`", "meaning"),
            (
                (
                    code(kind.__name__),
                    code(kind.__base__.__name__) if kind is not errors.FinloraError else "",
                    _exit_code(kind),
                    _status(failures.as_refusal, kind),
                    clean(inspect.getdoc(kind) or ""),
                )
                for kind in kinds
            ),
        ),
        "## Other exit codes",
        table(
            ("exit code", "meaning"),
            (
                ("0", "The command did what it was asked. A server, too, that a signal ended after its start."),
                (
                    "1",
                    "An error that no part of FinLoRA expected. The message names the file that holds its traceback.",
                ),
                ("2", "Also a wrong option or argument."),
                (
                    "129, 130, 143",
                    "A signal ended the command: a closed terminal, Ctrl-C, SIGTERM. A training leaves a checkpoint.",
                ),
                (
                    "75",
                    "The time of `finlora reproduce --minutes` was over before its plan was done: the same command goes on.",
                ),
                ("141", "The program that reads the output ended early, as `head` does."),
            ),
        ),
        "## HTTP errors",
        'The body has OpenAI\'s form: `{"error": {"message", "type", "param", "code"}}`. Programs go by status and `code`.',
        table(("status", "`code`", "meaning"), _http_rows()),
    )


def _exit_code(kind: Any) -> str:
    return "128 + signal" if kind.__name__ == "StoppedError" else str(kind.exit_code)


def _status(as_refusal: Callable[[Exception], Any], kind: Any) -> str:
    refusal = as_refusal(kind("text"))
    return f"{refusal.status} {code(refusal.code)}"


def _http_rows() -> list[tuple[str, str, str]]:
    from finlora.serve import failures
    from finlora.serve.body_faults import BODY_CODES
    from finlora.serve.http.context import WORDS

    found: dict[int, set[str]] = {}
    for _, status, _, entry, _ in failures._TABLE:
        found.setdefault(status, set()).add(entry)
    for file in sorted(Path(inspect.getfile(failures)).parent.rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "RefusedError" and len(call.args) > 2:
                status, entry = call.args[0], call.args[2]
                if isinstance(status, ast.Constant) and isinstance(entry, ast.Constant):
                    found.setdefault(status.value, set()).add(entry.value)
    found.setdefault(400, set()).update(BODY_CODES)
    for status, entry in failures.HTTP_CODES.items():
        found.setdefault(status, set()).add(entry)
    return [
        (str(status), ", ".join(map(code, sorted(found[status]))), clean(WORDS[status])) for status in sorted(found)
    ]


PAGES: dict[str, Callable[[], str]] = {
    "config.md": make_config,
    "serve-config.md": make_serve_config,
    "task-file.md": make_task_file,
    "commands.md": make_commands,
    "metrics.md": make_metrics,
    "errors.md": make_errors,
}


def main() -> int:
    """Write the pages, or compare them."""
    from generate_corrections import make_corrections
    from generate_deviations import make_deviations
    from generate_http import make_http

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a page is out of date")
    is_check = parser.parse_args().check
    stale = []
    others = {"http-api.md": make_http, "deviations.md": make_deviations, "corrections.md": make_corrections}
    for name, make in (PAGES | others).items():
        path, text = FOLDER / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not is_check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        sys.stdout.write(f"docs/reference/{name} {'is out of date: run ' + COMMAND if is_check else 'written'}\n")
    return int(bool(stale) and is_check)


if __name__ == "__main__":
    sys.exit(main())
