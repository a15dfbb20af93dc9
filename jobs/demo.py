"""The main job from raw data to report on any machine, without GPU, hub or network: `make demo` runs it.

Each step is the very command that a user types; it is printed before it runs. Everything lands in .demo/, and a second
run keeps the prepared data and the pretrained base.
"""

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(".demo")
CONFIG = "jobs/configs/demo-4bit-r4.yaml"
STEPS = (
    ("Generate the synthetic financial set", f"prepare synthetic --output {HERE}/data"),
    (
        "Pretrain a small Llama base on unlabelled text (once)",
        f"pretrain --tasks synthetic --output {HERE}/base --device cpu num_steps=280",
    ),
    ("Score the base", f"evaluate --config {CONFIG} --base"),
    ("Train a 4-bit rank-4 adapter with two Ray Train workers", f"train --config {CONFIG}"),
    ("Score the adapter", f"evaluate --config {CONFIG}"),
    ("Report", f"report {HERE}/runs --output {HERE}/report"),
)


def main() -> int:
    """Run every step, stop at the first that fails and pass its exit code on."""
    started = time.time()
    shutil.rmtree(HERE / "runs", ignore_errors=True)  # a demo trains anew each time
    for number, (title, command) in enumerate(STEPS, start=1):
        sys.stdout.write(f"\n[{number}/{len(STEPS)}] {title}\n$ finlora {command}\n")
        sys.stdout.flush()
        status = subprocess.run(
            [sys.executable, "-m", "finlora.cli.main", *shlex.split(command)], check=False
        ).returncode
        if status != 0:
            sys.stdout.write(f"\nStep {number} failed with exit code {status}: its message stands above.\n")
            return status
    sys.stdout.write(f"\nDone in {time.time() - started:.0f} s. Tables and plots: {HERE}/report/\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
