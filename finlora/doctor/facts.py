"""Facts of one machine for `finlora doctor` (versions, GPUs, disks, limits), gathered without Ray, torch or a CUDA context.

The same function runs in this process and as a task on each node of a cluster, so it imports only the standard library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finlora.machine.host import find_output_problem, find_ray_temp

PACKAGES = ("finlora", "ray", "torch", "transformers", "deepspeed", "bitsandbytes")
_SMI_S = 20.0
_QUERY = "index,name,memory.total,memory.used,driver_version"
_NAMES = re.compile(r"GPU\d+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A GPU as its driver reports it."""

    index: int
    name: str
    total_gib: float
    used_gib: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Disk:
    """A folder, or its nearest existing parent."""

    path: str
    free_gib: float
    used_share: float
    problem: str = ""
    """Why no file can be made there; empty if one can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """Facts of one machine. Every field has a default, since a node may run another version of this file."""

    host: str = ""
    python: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Name -> version of each installed package."""
    torch_cuda: str = ""
    """CUDA version of torch's build, such as `12.8`; empty: a CPU build."""
    driver: str = ""
    """Version of the GPU driver."""
    driver_cuda: str = ""
    """Newest CUDA version that the driver supports."""
    gpus: tuple[Gpu, ...] = ()
    gpu_problem: str = ""
    """Why GPUs could not be listed although a driver seems to be installed."""
    no_peer: tuple[str, ...] = ()
    """Pairs of GPUs without access to each other's memory, such as `0-1`."""
    visible: str | None = None
    """CUDA_VISIBLE_DEVICES; None: not set."""
    ray_gpus: float | None = None
    """GPUs that the node registered with Ray; None: no cluster."""
    bnb_binaries: tuple[str, ...] = ()
    """CUDA versions of bitsandbytes' binaries, such as `128`."""
    shm_gib: float | None = None
    """Size of /dev/shm; None: there is none."""
    open_files: int = 0
    """Hard limit of open files; -1: none."""
    clock: float = 0.0
    """Seconds since 1970 by the machine's clock."""
    skew_s: float | None = None
    """Seconds by which that clock is ahead of this machine's; None: it is this machine."""
    disks: tuple[Disk, ...] = ()
    missing: tuple[str, ...] = ()
    """Input paths of the config that do not exist."""


def gather(folders: Sequence[str] = (), inputs: Sequence[str] = ()) -> dict[str, Any]:
    """Return this machine's NodeFacts as plain values, to pass between processes and versions.

    Args:
        folders: of runs, data and caches, existing or not; the temporary folder is added.
        inputs: files and folders to read.
    """
    gpus, driver, problem = _list_gpus()
    facts = NodeFacts(
        host=socket.gethostname(),
        python=platform.python_version(),
        packages=_list_packages(),
        torch_cuda=_read_torch_cuda(),
        driver=driver,
        driver_cuda=_read_driver_cuda(),
        gpus=gpus,
        gpu_problem=problem,
        no_peer=_list_no_peer() if len(gpus) > 1 else (),
        visible=os.environ.get("CUDA_VISIBLE_DEVICES"),
        bnb_binaries=_list_bnb_binaries(),
        shm_gib=_measure_shm(),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        clock=time.time(),
        missing=tuple(path for path in inputs if not Path(path).exists()),
        disks=tuple(look_at(Path(folder)) for folder in dict.fromkeys([*folders, str(find_ray_temp())])),
    )
    return dataclasses.asdict(facts)


def rebuild(values: Mapping[str, Any]) -> NodeFacts:
    """Return another machine's facts, without fields that only its version has."""
    names = {each.name for each in dataclasses.fields(NodeFacts)}
    known: dict[str, Any] = {name: value for name, value in values.items() if name in names}
    known["gpus"] = tuple(Gpu(**gpu) for gpu in known.get("gpus", ()))
    known["disks"] = tuple(Disk(**disk) for disk in known.get("disks", ()))
    return NodeFacts(**known)


def look_at(folder: Path) -> Disk:
    """Return free space of a folder or its nearest existing parent, and whether it can be written."""
    there = folder.expanduser().absolute()
    problem = find_output_problem(there)
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        usage = shutil.disk_usage(there)
    except OSError as error:
        return Disk(path=str(folder), free_gib=0.0, used_share=0.0, problem=problem or error.strerror or str(error))
    return Disk(
        path=str(folder),
        free_gib=usage.free / 2**30,
        used_share=1 - usage.free / usage.total if usage.total else 1.0,
        problem=problem or "",
    )


def parse_gpus(text: str) -> tuple[tuple[Gpu, ...], str]:
    """Parse `nvidia-smi --query-gpu` in CSV without units; returns the GPUs and the driver's version."""
    gpus, driver = [], ""
    for line in text.strip().splitlines():
        index, name, total, used, driver = (part.strip() for part in line.split(","))
        # [N/A] for GPUs that share the machine's memory.
        sizes = [float(size) / 1024 if size.replace(".", "").isdigit() else 0.0 for size in (total, used)]
        gpus.append(Gpu(index=int(index), name=name, total_gib=sizes[0], used_gib=sizes[1]))
    return tuple(gpus), driver


def parse_no_peer(text: str) -> tuple[str, ...]:
    """Parse the matrix of `nvidia-smi topo -p2p r`; returns the pairs of GPUs whose cell is not OK."""
    found = []
    for line in re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines():
        name, *cells = line.split() or [""]
        if _NAMES.fullmatch(name) and cells and not _NAMES.fullmatch(cells[0]):
            row = int(name[3:])
            found += [
                f"{row}-{column}" for column, cell in enumerate(cells) if column > row and cell not in ("OK", "X")
            ]
    return tuple(found)


def _list_gpus() -> tuple[tuple[Gpu, ...], str, str]:
    text, problem = _ask_smi(f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits")
    if text is None:
        return (), "", problem
    try:
        return (*parse_gpus(text), "")
    except ValueError:
        return (), "", f"nvidia-smi answers {text[:80]!r}"


def _list_no_peer() -> tuple[str, ...]:
    text, _ = _ask_smi("topo", "-p2p", "r")
    return parse_no_peer(text) if text else ()


def _ask_smi(*arguments: str) -> tuple[str | None, str]:
    """Return the output of nvidia-smi, or None and the reason; without a driver the reason is empty."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None, "there are /dev/nvidia* devices but no nvidia-smi" if Path("/dev/nvidiactl").exists() else ""
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=_SMI_S, check=False)
    except subprocess.TimeoutExpired:
        return None, f"nvidia-smi does not answer within {_SMI_S:g} s"
    except OSError as error:
        return None, f"nvidia-smi cannot be run ({error.strerror})"
    words = " ".join((done.stdout + done.stderr).split())[:200]
    return (done.stdout, "") if done.returncode == 0 else (None, f"nvidia-smi says: {words}")


def _read_driver_cuda() -> str:
    """Read the version from the driver's library, which needs no device."""
    version = ctypes.c_int(0)
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) != 0:
            return ""
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}" if version.value else ""


def _read_torch_cuda() -> str:
    """Parse torch/version.py: importing torch would take seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        return ""
    try:
        text = (Path(found.submodule_search_locations[0]) / "version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return match.group(1) if match else ""


def _list_bnb_binaries() -> tuple[str, ...]:
    found = importlib.util.find_spec("bitsandbytes")
    if found is None or not found.submodule_search_locations:
        return ()
    files = Path(found.submodule_search_locations[0]).glob("libbitsandbytes_cuda*.so")
    return tuple(sorted(file.stem.removeprefix("libbitsandbytes_cuda") for file in files))


def _list_packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _measure_shm() -> float | None:
    try:
        return shutil.disk_usage("/dev/shm").total / 2**30
    except OSError:
        return None
