"""The main job from raw data to a served adapter on any machine, without GPU, hub or network: `make demo` runs it.

Each step is the very command that a user types; it is printed before it runs. Everything lands in .demo/, and a second
run keeps the prepared data and the pretrained base.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
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


SERVE = "serve --config serve_configs/cpu-demo.yaml"
# In the words of the generated set: so small a base knows no others.
ASK = "'Nordhaven Shipping said its profit rose by 12 % to 340 million in May .' --task fpb --model demo:synthetic"


def serve_and_ask() -> int:
    """Serve the trained adapter over HTTP, ask it one question, and end the server again."""
    shutil.copytree(HERE / "runs" / "demo-4bit-r4" / "adapter", HERE / "adapters" / "synthetic", dirs_exist_ok=True)
    (HERE / "keys.yaml").unlink(missing_ok=True)
    with socket.socket() as free:  # 8000 may be taken
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{(port := free.getsockname()[1])}"
    sys.stdout.write(
        f"\n[{len(STEPS) + 1}/{len(STEPS) + 1}] Serve the adapter in two stages and ask it\n"
        f"$ finlora key demo --file {HERE}/keys.yaml\n$ finlora {SERVE} --port {port} &\n"
    )
    sys.stdout.flush()
    finlora = [sys.executable, "-m", "finlora.cli.main"]
    made = subprocess.run(
        [*finlora, "key", "demo", "--file", str(HERE / "keys.yaml")], check=True, text=True, stdout=subprocess.PIPE
    )
    key = made.stdout.strip()
    server = subprocess.Popen([*finlora, *shlex.split(SERVE), "--port", str(port)])
    try:
        while not is_ready(address, key):
            if server.poll() is not None:
                return server.returncode or 1
            time.sleep(0.5)
        sys.stdout.write(f"$ FINLORA_API_KEY=... finlora ask {ASK} --server {address}\n")
        sys.stdout.flush()
        command = [*finlora, "ask", *shlex.split(ASK), "--server", address]
        return subprocess.run(command, check=False, env={**os.environ, "FINLORA_API_KEY": key}).returncode
    finally:
        server.terminate()
        server.wait(timeout=120)


def is_ready(address: str, key: str) -> bool:
    # Without the proxy that http_proxy may name: the server is on this machine, and the key is for it alone.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"{address}/readyz", headers={"Authorization": f"Bearer {key}"})
    try:
        with opener.open(request, timeout=30):
            return True
    except OSError:
        return False


def main() -> int:
    """Run every step, stop at the first that fails and pass its exit code on."""
    started = time.time()
    shutil.rmtree(HERE / "runs", ignore_errors=True)  # a demo trains anew each time
    for number, (title, command) in enumerate(STEPS, start=1):
        sys.stdout.write(f"\n[{number}/{len(STEPS) + 1}] {title}\n$ finlora {command}\n")
        sys.stdout.flush()
        status = subprocess.run(
            [sys.executable, "-m", "finlora.cli.main", *shlex.split(command)], check=False
        ).returncode
        if status != 0:
            sys.stdout.write(f"\nStep {number} failed with exit code {status}: its message stands above.\n")
            return status
    status = serve_and_ask()
    if status != 0:
        sys.stdout.write("\nThe served adapter did not answer: its message stands above.\n")
        return status
    sys.stdout.write("So small a base knows sentences of this form alone; step 5 says how often it is right.\n")
    sys.stdout.write(f"\nDone in {time.time() - started:.0f} s. Tables and plots: {HERE}/report/\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
