"""Verbs of serving: bring a model up behind HTTP, make keys for it, check what it logged."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finlora.cli.app import DryRun, Overrides, app, console, say
from finlora.machine.host import require_output
from finlora.terminal import open_bars


@app.command(
    epilog="Examples:\n\n  finlora serve --config serve_configs/cpu-demo.yaml\n\n"
    "  finlora serve --config serve_configs/llama-8b-8bit.yaml --port 8001 stages.cache_rows=65536"
)
def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="Serve YAML; see serve_configs/.")],
    overrides: Overrides = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at. Without it: the YAML's, 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Without it: the YAML's.")] = None,
    direct_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Answer here too, past Ray Serve's proxy: several times the requests a second."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve a base and its adapters over HTTP until Ctrl-C: OpenAI's paths, classification, extraction, a web page."""
    from finlora.cluster import connect

    changes = [*(overrides or []), *([f"direct.port={direct_port}"] if direct_port is not None else [])]
    if dry_run:
        from finlora.serve.deploy.serve_yaml import read_deployment

        deployment = read_deployment(config, changes)
        settings = deployment.settings
        say(
            f"{settings.name}: {settings.model.base} at {settings.bits} bit in {settings.stages.num} stages on "
            f"{settings.stages.device}, {deployment.options.get('num_replicas', 1)} copies, "
            f"{settings.stages.cache_rows:,} tokens of cache"
        )
        return
    # A machine at work takes longer to start Ray Serve's HTTP proxy than the 5 s that Ray gives it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    connect.prepare()
    from finlora.serve.deploy.serve_yaml import (
        check_server,
        read_deployment,
        run_server,
    )  # Ray reads its settings when it is imported

    with open_bars(console, "starting the server") as bars:

        def tell(line: str) -> None:
            bars.do(None)
            say(line)

        deployment = check_server(read_deployment(config, changes), host, port, is_here=connect.is_local())
        connect.connect(log_to_driver=False)
        run_server(deployment, tell)


@app.command(
    epilog="Example:\n\n  finlora key tradingdesk --file ~/finlora/keys.yaml --adapters fpb,ner --requests 120"
)
def key(
    name: Annotated[str, typer.Argument(help="Name in logs and metrics: small letters and digits.")],
    file: Annotated[Path, typer.Option(help="Key file; made where it is missing.")] = Path("~/finlora/keys.yaml"),
    adapters: Annotated[
        str, typer.Option(help="Adapters that it may use, by commas; `base`: the base alone. Without it: all.")
    ] = "",
    requests: Annotated[int | None, typer.Option(min=1, help="Requests a minute. Without it: no limit.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Prompt and answer tokens a minute.")] = None,
    admin: Annotated[bool, typer.Option("--admin", help="May roll adapters back.")] = False,
) -> None:
    """Make an API key: its hash goes into the file, the key itself is shown once. Delete its entry to take it away."""
    from finlora.serve.accounts.keys import add_key

    names = tuple(part.strip() for part in adapters.split(",") if part.strip()) or None

    def show(made: str) -> None:
        console.out(made)
        sys.stdout.flush()

    add_key(
        require_output("--file ", file, is_new=True),
        name,
        adapters=names,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        is_admin=admin,
        show=show,
    )


@app.command(
    epilog="Examples:\n\n  finlora audit ~/finlora/audit\n\n  finlora audit ~/finlora/audit --head 9f86d081884c7d65..."
)
def audit(
    path: Annotated[Path, typer.Argument(help="An audit log, or the folder of all.")],
    head: Annotated[
        list[str] | None, typer.Option(help="A head that the server's log told: it must stand in one of the logs.")
    ] = None,
) -> None:
    """Check that audit logs are whole: no line changed, taken out or put in between; with --head, none cut off before it."""
    from finlora.errors import ResultError
    from finlora.serve.accounts.audit import list_logs, verify_audit

    missing = {text.strip().lower() for text in head or []}
    for log in list_logs(path.expanduser()):
        report = verify_audit(log, missing)
        missing -= report.found
        torn = (
            "; behind it a line was begun and not ended, as when the server is killed" if report.has_torn_line else ""
        )
        if report.count == 0:
            say(f"{log}: empty{torn}. No question was logged yet, or all lines were cut off: --head looks for them.")
        else:
            say(f"{log}: {report.count:,} entries, whole; the last is {report.head}{torn}")
    if missing:
        raise ResultError(
            f"no log of {path} holds the head {min(missing)}: entries that the server wrote were cut off, or a log was taken "
            "away or written anew. Compare with a copy of the log."
        )
