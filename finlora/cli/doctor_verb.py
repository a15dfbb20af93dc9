"""The verb that looks for what is missing before any other is run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from finlora.cli.app import ConfigPath, Overrides, app, console, load_settings, say
from finlora.printed_table import print_table

_COLOURS = {"ok": "green", "warning": "yellow", "fault": "bold red"}


@app.command(
    epilog="Examples:\n\n  finlora doctor\n\n  finlora doctor --config jobs/configs/llama-8b-4bit-r4-fpb.yaml\n\n"
    "  finlora doctor --config serve_configs/llama-8b-8bit.yaml --json\n\n"
    "  ray job submit --address http://HEAD:8265 --working-dir . -- python jobs/doctor.py --config jobs/configs/NAME.yaml"
)
def doctor(
    config: ConfigPath = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine, the nodes of the cluster at RAY_ADDRESS and a config for what a run needs. Changes nothing."""
    from finlora.doctor.checks import exit_code
    from finlora.doctor.examine import examine

    findings = examine(*_read(config, overrides or []))
    code = exit_code(findings)
    if as_json:
        values = {"exit_code": code, "findings": [dataclasses.asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(values, indent=2) + "\n")
    else:
        _show(findings)
    raise typer.Exit(code)


def _read(config: Path | None, overrides: Sequence[str]) -> tuple[Any, Any, float, Callable[[Any], list[Any]]]:
    """Return the settings of a run, its base and GPUs; of a Serve YAML base and GPUs, and what looks for faults of the server."""
    if config is None and not overrides:
        return None, None, 0.0, lambda _base: []
    from finlora.configfile import is_server_file

    if config is None or not is_server_file(config):
        from finlora.doctor.examine import count_wanted

        settings = load_settings(config, overrides)
        return settings, settings.model, count_wanted(settings), lambda _base: []
    from finlora.cluster import connect

    connect.prepare()
    from finlora.doctor.checks import from_error, ok
    from finlora.errors import FinloraError
    from finlora.serve.deploy.serve_yaml import check_server, count_stages, read_deployment  # imports Ray: see above
    from finlora.serve.settings import make_absolute

    deployment = read_deployment(config, overrides)

    def look_further(base: Any) -> list[Any]:
        try:
            check_server(deployment, None, None, is_here=connect.is_local(), files=base)
        except FinloraError as error:
            return [from_error("server", error)]
        return [ok("server", "ports, certificate, keys, base and tokenizer can be used")]

    stages = deployment.settings.stages
    gpus = count_stages(deployment) * stages.gpus if stages.device == "cuda" else 0.0
    return None, make_absolute(deployment.settings).model, gpus, look_further


def _show(findings: Sequence[Any]) -> None:
    if not console.is_terminal:
        for each in findings:
            advice = f" -> {each.advice}" if each.advice else ""
            say(f"{each.level:7} {each.check}: {each.found}{advice}")
    else:
        rows = [
            (Text(each.level, style=_COLOURS[each.level]), each.check, each.found, each.advice) for each in findings
        ]
        print_table(console, ("", "check", "found", "what to do"), rows)
    counts = {level: sum(each.level == level for each in findings) for level in _COLOURS}
    say(f"{counts['ok']} ok, {counts['warning']} warnings, {counts['fault']} faults.")
