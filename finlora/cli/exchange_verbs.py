"""Verbs that take adapters from other programs and give models to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from finlora.cli.app import Overrides, app, console, load_settings, say
from finlora.config import Bits
from finlora.errors import ConfigError
from finlora.machine.host import require_output
from finlora.terminal import open_bars


@app.command(
    epilog="Examples:\n\n  finlora adopt lora-fpb/ --base meta-llama/Llama-3.1-8B-Instruct --task fpb --output adapters/fpb"
    "\n\n  finlora adopt MIRROR/adapters/OWNER/NAME --base MIRROR/models/OWNER/BASE --bits 8 --output adapters/NAME"
)
def adopt(
    adapter: Annotated[
        str, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors, or hub id.")
    ],
    base: Annotated[str, typer.Option(help="Base model: its folder or hub id, as owner/name or owner/name@revision.")],
    output: Annotated[Path, typer.Option(help="New folder for the copy with its contract.")],
    template: Annotated[
        Literal["raw", "chat"] | None,
        typer.Option(help="Template of its training prompts, as model.template. Default: unknown."),
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option(help="Bits of the base in its training: 16, 8 (LLM.int8) or 4 (NF4). Default: unknown."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Task that it was trained on, built in or as a task file; several times. Default: unknown."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of its tokenizer, as model.tokenizer. Default: the base's.")
    ] = None,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="Accept that it names another base, whose weights --base has too.")
    ] = False,
) -> None:
    """Check a PEFT adapter that another program trained, and copy it with a contract that names what is unknown."""
    if bits not in (None, 16, 8, 4):
        raise ConfigError(f"found --bits {bits}: expected 16, 8 or 4, or nothing where it is not known.")
    folder = require_output("--output ", output, is_new=True)
    from finlora.config import ModelConfig
    from finlora.exchange.adopt import adopt as adopt_folder

    here = Path(base).expanduser()
    name, _, revision = (str(here.absolute()), "", "") if here.exists() else base.partition("@")
    model = ModelConfig(
        base=name,
        revision=revision or None,
        tokenizer=str(tokenizer.expanduser().absolute()) if tokenizer else None,
        template=template or "raw",
    )
    with open_bars(console, "checking the adapter"):
        adopted = adopt_folder(
            *(adapter, model, folder),
            template=template,
            bits=cast(Bits | None, bits),
            tasks=task or [],
            is_other_base=other_base,
        )
    contract = adopted.contract
    say(
        f"Adopted {contract.adopted.source if contract.adopted else adapter}: rank {contract.rank}, alpha {contract.alpha:g}, on "
        f"{', '.join(contract.target_modules)} of {contract.base}"
    )
    say(f"Checked: {'; '.join(adopted.agreed)}.")
    if contract.adopted and contract.adopted.rewritten:
        say(f"Rewritten in adapter_config.json, with the same effect: {', '.join(contract.adopted.rewritten)}.")
    say(contract.describe_unknown())
    say(
        f"Written to {adopted.folder}. Next: finlora evaluate --config {adopted.folder}/config.yaml --adapter {adopted.folder}"
    )


@app.command(
    epilog="Examples:\n\n  finlora parity ~/finlora/runs/llama-8b-4bit-r4-fpb/adapter --bits 8\n\n"
    "  finlora parity ADAPTER --merged MERGED --limit 200 eval.device=cpu"
)
def parity(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    overrides: Overrides = None,
    bits: Annotated[
        list[int] | None,
        typer.Option(
            help="Bits of a base that serves it: 16, 8 or 4; several times. Default: all but those of its training."
        ),
    ] = None,
    merged: Annotated[
        list[Path] | None, typer.Option(help="Folder that `finlora merge` made of it; several times.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Test rows of each task, chosen by the setting `seed`. Default: all.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of the run. Default: the adapter's config.yaml.")
    ] = None,
) -> None:
    """Compare an adapter's answers as it was trained with those as it is served. Writes parity.json beside it."""
    if wrong := [each for each in bits or [] if each not in (16, 8, 4)]:
        raise ConfigError(f"found --bits {wrong[0]}: expected 16, 8 or 4.")
    folder = adapter.expanduser().absolute()
    from finlora.model.contract import read_contract

    contract = read_contract(folder)  # says what was found instead of an adapter
    settings = load_settings(config or folder / "config.yaml", overrides)
    from finlora.evaluate.parity_report import PARITY_FILE, parity_table
    from finlora.exchange.parity import measure_parity
    from finlora.report.write import draw_table

    chosen = bits if bits is not None else [] if merged else [each for each in (16, 8, 4) if each != contract.bits]
    if settings.eval.num_stages > 1:
        from finlora.cluster import connect

        connect.connect(log_to_driver=False)
    with open_bars(console, "loading the base") as bars:
        found = measure_parity(
            *(settings, folder),
            bits=[cast(Bits, each) for each in dict.fromkeys(chosen)],
            merged=[path.expanduser().absolute() for path in merged or []],
            limit=limit,
            on_progress=bars.update,
        )
    draw_table(parity_table(found), console)
    say(f"Written to {folder / PARITY_FILE}")
