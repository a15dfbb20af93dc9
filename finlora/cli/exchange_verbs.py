"""Verbs that take adapters from other programs and give models to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from finlora.cli.app import app, console, say
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
