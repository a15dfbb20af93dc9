"""Verbs of serving: bring a model up behind HTTP, make keys for it, check what it logged."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from finlora.cli.app import OVERRIDES, DryRun, app, console, say
from finlora.machine.host import require_output
from finlora.terminal import open_bars


@app.command(
    epilog="Examples:\n\n  finlora serve --config serve_configs/cpu-demo.yaml\n\n"
    "  finlora serve --config serve_configs/llama-8b-8bit.yaml --port 8001 stages.cache_rows=65536"
)
def serve(
    config: Annotated[Path, typer.Option("--config", "-c", help="Serve YAML; see serve_configs/.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=OVERRIDES, help="Server settings that win over the YAML, such as stages.cache_rows=65536."
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen at. Default: the YAML's, or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port to listen at. Default: the YAML's.")] = None,
    direct_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Second port, without Ray Serve's proxy: several times as many requests per second."
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Serve a base and its adapters over HTTP until Ctrl-C: OpenAI's endpoints, labels, extraction, a web page."""
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
    # A busy machine takes longer to start Ray Serve's HTTP proxy than the 5 s that Ray allows.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")
    connect.prepare()
    from finlora.serve.deploy.serve_yaml import (
        check_server,
        open_start_up,
        read_deployment,
        run_server,
    )  # Ray reads its settings when it is imported

    with open_bars(console, "starting the server") as bars, contextlib.ExitStack() as stack:

        def tell(line: str) -> None:
            bars.do(None)
            say(line)

        read = read_deployment(config, changes)
        metrics_port = read.settings.metrics_port
        connect.require_local_metrics(metrics_port)
        door = open_start_up(read, host, port) if connect.is_local() else None
        if door is not None:
            stack.callback(door.close)
        deployment = check_server(read, host, port, is_here=False)
        connect.connect(log_to_driver=False, metrics_port=metrics_port)
        run_server(deployment, tell, door)


@app.command(
    epilog="Example:\n\n  finlora key tradingdesk --file ~/finlora/keys.yaml --adapters fpb,ner --requests 120"
)
def key(
    name: Annotated[str, typer.Argument(help="Name of the key in logs and metrics: small letters and digits.")],
    file: Annotated[Path, typer.Option(help="Key file. Created where it is missing.")] = Path("~/finlora/keys.yaml"),
    adapters: Annotated[
        str,
        typer.Option(help="Adapters that the key may use, separated by commas; `base`: the base alone. Default: all."),
    ] = "",
    requests: Annotated[int | None, typer.Option(min=1, help="Most requests per minute. Default: no limit.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Most prompt and answer tokens per minute. Default: no limit.")
    ] = None,
    admin: Annotated[
        bool, typer.Option("--admin", help="Let the key choose which version of an adapter is served.")
    ] = False,
) -> None:
    """Make an API key. Shows it once and keeps its hash in the key file. Delete its entry there to revoke it."""
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
    path: Annotated[Path, typer.Argument(help="An audit log, or a folder of audit logs.")],
    head: Annotated[
        list[str] | None,
        typer.Option(help="Last hash of the chain, from the server's log. It must be in one of the audit logs."),
    ] = None,
) -> None:
    """Check that no line of an audit log was changed, removed or inserted; with --head, that its end was not cut off."""
    from finlora.errors import ResultError
    from finlora.serve.accounts.audit import list_logs, verify_audit

    missing = {text.strip().lower() for text in head or []}
    for log in list_logs(path.expanduser()):
        report = verify_audit(log, missing)
        missing -= report.found
        torn = "; the line after it is incomplete, as after a killed server" if report.has_torn_line else ""
        if report.count == 0:
            say(f"{log}: empty{torn}. No question was logged yet, or all lines were cut off: --head detects that.")
        else:
            say(f"{log}: {report.count:,} entries, intact; the last is {report.head}{torn}")
    if missing:
        raise ResultError(
            f"no log of {path} holds the head {min(missing)}: entries that the server wrote were cut off, or a log was taken "
            "away or rewritten. Compare with a copy of the log."
        )
