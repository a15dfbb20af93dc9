"""Command `finlora warm`: compiles a base's GPU kernels ahead of its use."""

from __future__ import annotations

from finlora.cli.app import ConfigPath, Overrides, app, console, load_settings, say
from finlora.terminal import open_bars


@app.command(
    epilog="Examples:\n\n  finlora warm --config jobs/configs/llama-8b-4bit-r4-fpb.yaml\n\n"
    "  TRITON_CACHE_DIR=/opt/kernels finlora warm model.base=/models/llama-8b"
)
def warm(config: ConfigPath = None, overrides: Overrides = None) -> None:
    """Compile the GPU kernels of a base for this machine's GPU, so that no later command waits for them."""
    from finlora.inference.warm_kernels import list_facts, require_gpu, warm_base
    from finlora.machine.kernel_folder import VARIABLE, keep_kernels
    from finlora.model.base_files import read_base_files

    device = require_gpu()
    settings = load_settings(config, overrides)
    files = read_base_files(settings.model)
    with open_bars(console, "compiling"):
        warm_base(settings, files, lambda warmed: say(warmed.describe()))
    facts = ", ".join(f"{name} {value}" for name, value in list_facts(device).items())
    say(
        f"Kernels in {keep_kernels()}. A copy of this folder serves any machine with {facts}: name it in {VARIABLE} there."
    )
