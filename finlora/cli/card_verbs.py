"""Verbs of a model's approval: the document that it rests on, and the decision."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from finlora.cli.app import app, say
from finlora.errors import ResultError
from finlora.machine.host import require_output


@app.command(
    epilog="Examples:\n\n  finlora card ~/finlora/runs/NAME/adapter --output card/\n\n"
    "  finlora card ADAPTER --output card/ --profile eu-ai-act-annex-iv --results ~/finlora/runs\n\n"
    "  finlora card ADAPTER --output card/ --head 9f86d081884c7d65..."
)
def card(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Annotated[
        Path, typer.Option(help="Folder for card.html, card.md, plots, and fields.yaml with what only you can answer.")
    ],
    profile: Annotated[
        str, typer.Option(help="Rule book: sr-26-2, eu-ai-act-annex-iv, or a YAML file of your own.")
    ] = "sr-26-2",
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results file, or folder of runs; several times. Default: the run of the adapter."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the prepared tasks. Default: data.dir of the adapter's config.")
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="Hash of an entry, as `finlora approve` printed it. It must be among the approvals."),
    ] = None,
    texts: Annotated[
        bool, typer.Option("--texts/--no-texts", help="Show the first example of the test split as a rendered prompt.")
    ] = True,
) -> None:
    """Write a validation report of an adapter: verdict, open points, scores, data, lineage, approvals. HTML and Markdown."""
    from finlora.card.approvals import require_heads
    from finlora.card.evidence import collect_evidence
    from finlora.card.profile import FIELDS_FILE, extend_fields, load_profile, read_fields
    from finlora.card.write_card import build_card, write_card

    chosen = load_profile(profile)
    folder = require_output("--output ", output)
    evidence = collect_evidence(
        adapter.expanduser().absolute(),
        [path.expanduser() for path in results or []],
        data.expanduser() if data else None,
        read_fields(folder),
    )
    require_heads(evidence.folder, evidence.approvals.entries, head or [])
    document = build_card(evidence, chosen, has_texts=texts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        extend_fields(folder, chosen.fields)
        paths = write_card(document, folder)
    except OSError as error:
        raise ResultError(
            f"the card cannot be written to {folder} ({error}): give a folder you may write to."
        ) from error
    for sentence in document.verdict:
        say(sentence)
    state = evidence.approvals
    say(
        f"Approval: {state.refusal or f'{state.entries[-1].by} approved these files on {state.entries[-1].time[:10]}.'}"
    )
    say(f"Open points: {len(document.open_points)}, listed at the top. Yours to answer: {folder / FIELDS_FILE}")
    plots = f"{len(paths) - 2} plot{'' if len(paths) == 3 else 's'}"
    say(f"Written: {paths[0]}, {paths[1].name} and {plots}")


@app.command(
    epilog="Examples:\n\n  finlora approve ADAPTER --by 'A. Validator' --decision approved --card card/card.html\n\n"
    "  finlora approve ADAPTER --by 'A. Validator' --decision rejected --note 'too few letters of 2025'"
)
def approve(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    by: Annotated[str, typer.Option(help="Name of who decides.")],
    decision: Annotated[Literal["approved", "rejected"], typer.Option(help="The decision. The last one counts.")],
    note: Annotated[str, typer.Option(help="Reason or condition, on one line.")] = "",
    card: Annotated[
        Path | None, typer.Option(help="Document that the decision rests on; its hash is recorded.")
    ] = None,
) -> None:
    """Record a decision about an adapter as it is now, in approvals.jsonl of its folder: a hash chain."""
    from finlora.card.approvals import APPROVALS_FILE, add_approval

    folder = adapter.expanduser().absolute()
    entry = add_approval(folder, by=by, decision=decision, note=note, card=card.expanduser() if card else None)
    say(f"{entry.by} {entry.decision} adapter {entry.adapter_hash[:16]}: {folder / APPROVALS_FILE}")
    say(f"Hash of this entry, to keep elsewhere: {entry.hash}")
