"""Findings from the facts of machines: pure functions, so that tests can pass facts of any GPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from finlora.doctor.facts import PACKAGES, Disk, NodeFacts
from finlora.errors import ConfigError, FinloraError, ResourceError

Level = Literal["ok", "warning", "fault"]

_MIN_FREE_GIB, _LOW_FREE_GIB = 0.0625, 5.0
_FULL_SHARE = 0.95
"""Share of a disk above which Ray writes no objects; source: RAY_local_fs_capacity_threshold."""
_MIN_SHM_GIB = 1.0
"""With Docker's default of 64 MiB workers are killed with `Bus error`."""
_MIN_OPEN_FILES = 8192
"""Ray's recommendation; source: ray/_private/worker.py, `init`."""
_MAX_SKEW_S = 5.0
_BUSY_GIB = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """Result of one check."""

    check: str
    level: Level
    found: str
    advice: str = ""
    """Advice; empty if all is well."""
    code: int = 0
    """Exit code of a fault's class, else 0."""


def ok(check: str, found: str) -> Finding:
    return Finding(check=check, level="ok", found=found)


def warn(check: str, found: str, advice: str) -> Finding:
    return Finding(check=check, level="warning", found=found, advice=advice)


def fault(check: str, found: str, advice: str, kind: type[FinloraError] = ResourceError) -> Finding:
    return Finding(check=check, level="fault", found=found, advice=advice, code=kind.exit_code)


def from_error(check: str, error: FinloraError) -> Finding:
    """Return one of our errors as a fault; its message holds the advice."""
    return Finding(check=check, level="fault", found=str(error), code=error.exit_code)


def exit_code(findings: Sequence[Finding]) -> int:
    """Return the code of the first fault, or 0."""
    return next((finding.code for finding in findings if finding.level == "fault"), 0)


def check_nodes(nodes: Sequence[NodeFacts], *, gpus_wanted: float) -> Iterator[Finding]:
    """Check all machines.

    Args:
        nodes: this machine first, then those of the cluster.
        gpus_wanted: total GPUs of the config; 0: it runs on CPUs.
    """
    yield from check_versions(nodes)
    workers = nodes[1:] or nodes
    yield from check_gpus(nodes, gpus_wanted)
    for node in workers:
        yield from check_cuda(node, is_wanted=gpus_wanted > 0)
    for node in workers:
        yield from check_limits(node)
    for node in nodes:
        yield from check_clock(node)
    for node in nodes[1:]:
        for path in node.missing:
            yield fault(
                "files",
                f"{node.host}: {path} does not exist",
                "put it where every node sees it, under the same path",
                ConfigError,
            )
    seen: set[tuple[str, str]] = set()
    for node in nodes:
        for disk in node.disks:
            if (node.host, disk.path) not in seen:
                seen.add((node.host, disk.path))
                yield check_disk(node.host, disk)


def check_versions(nodes: Sequence[NodeFacts]) -> Iterator[Finding]:
    """Compare Python and the packages of every machine with this one's."""
    own = nodes[0]
    words = ", ".join(f"{name} {own.packages[name]}" for name in PACKAGES if name in own.packages)
    yield ok("versions", f"{own.host}: Python {own.python}, {words}")
    for node in nodes[1:]:
        other = [
            f"{name} {node.packages.get(name, 'missing')} there, {own.packages.get(name, 'missing')} here"
            for name in PACKAGES
            if node.packages.get(name) != own.packages.get(name)
        ]
        if node.python != own.python:
            other.insert(0, f"Python {node.python} there, {own.python} here")
        if not other:
            yield ok("versions", f"{node.host}: the same")
            continue
        hard = node.python != own.python or any(
            node.packages.get(name) != own.packages.get(name) for name in ("ray", "finlora")
        )
        make = fault if hard else warn
        yield make("versions", f"{node.host}: {'; '.join(other)}", "install the same environment on every node")


def check_gpus(nodes: Sequence[NodeFacts], wanted: float) -> Iterator[Finding]:
    """Check the GPUs of the nodes, which compute, and of this machine, which may have none."""
    workers = nodes[1:] or nodes
    total = 0.0
    for node in workers:
        listed = ", ".join(f"{gpu.name} {gpu.total_gib:.0f} GiB" for gpu in node.gpus)
        counted = float(len(node.gpus)) if node.ray_gpus is None else node.ray_gpus
        total += counted
        if node.gpu_problem:
            advice = "repair the driver: after an update of it, restart the machine"
            make = fault if wanted > 0 else warn
            yield make("GPUs", f"{node.host}: {node.gpu_problem}", advice)
        elif node.visible is not None and node.gpus and node.ray_gpus is None:
            hidden = "hides them all" if node.visible.strip() in ("", "-1") else "decides which are used"
            make = fault if wanted > 0 and node.visible.strip() in ("", "-1") else warn
            yield make(
                "GPUs",
                f"{node.host}: {listed}; CUDA_VISIBLE_DEVICES={node.visible!r} {hidden}",
                "unset it, since Ray assigns GPUs to workers itself",
            )
        elif node.ray_gpus is not None and node.ray_gpus != len(node.gpus):
            yield warn(
                "GPUs",
                f"{node.host}: the driver lists {len(node.gpus)} ({listed or 'none'}), Ray was told {node.ray_gpus:g}",
                "unless intended, restart the node without CUDA_VISIBLE_DEVICES, or with `ray start --num-gpus`",
            )
        else:
            yield ok("GPUs", f"{node.host}: {listed or 'none'}")
        busy = [f"{gpu.index} ({gpu.used_gib:.1f} GiB)" for gpu in node.gpus if gpu.used_gib > _BUSY_GIB]
        if busy:
            yield warn("GPUs", f"{node.host}: in use already: {', '.join(busy)}", "`nvidia-smi` shows the processes")
        if node.no_peer:
            yield warn(
                "peer access",
                f"{node.host}: GPUs {', '.join(node.no_peer)} do not reach each other's memory",
                "stages and NCCL use the host's memory there, which works but is slower; see docs/how-to/troubleshooting.md",
            )
        elif len(node.gpus) > 1:
            yield ok("peer access", f"{node.host}: all GPUs reach each other")
    if wanted > total:
        yield fault(
            "GPUs",
            f"the config asks for {wanted:g} GPUs, but there are {total:g}",
            "set train.num_workers and eval.num_gpus lower, add nodes, or take train.device=cpu eval.device=cpu",
        )
    if len(nodes) > 1 and nodes[0].host not in {node.host for node in workers}:
        yield warn(
            "GPUs", f"{nodes[0].host} is not a node of the cluster", "submit commands as jobs, `ray job submit ...`"
        )


def check_cuda(node: NodeFacts, *, is_wanted: bool) -> Iterator[Finding]:
    """Compare torch's CUDA build with the driver, and bitsandbytes' binaries with torch."""
    make = fault if is_wanted else warn
    if not node.gpus and not is_wanted:
        return
    if not node.torch_cuda:
        yield make(
            "CUDA",
            f"{node.host}: torch {node.packages.get('torch', 'missing')} is a CPU build",
            "install the CUDA build: `make setup TORCH=gpu`",
        )
        return
    if not node.driver_cuda:
        yield make(
            "CUDA", f"{node.host}: libcuda.so.1 is missing", "install the GPU driver, or give the container the GPUs"
        )
        return
    build, driver = _numbers(node.torch_cuda), _numbers(node.driver_cuda)
    words = (
        f"{node.host}: torch is built for CUDA {node.torch_cuda}, driver {node.driver or '?'} runs {node.driver_cuda}"
    )
    if build[0] > driver[0]:
        yield make("CUDA", words, "update the driver, or install a torch built for the older CUDA")
    elif build > driver:
        yield warn("CUDA", words, "update the driver: kernels that are compiled at run time may not load")
    else:
        yield ok("CUDA", words)
    name = "".join(node.torch_cuda.split(".")[:2])
    if name in node.bnb_binaries:
        yield ok("bitsandbytes", f"{node.host}: has a binary for CUDA {node.torch_cuda}")
    else:
        yield make(
            "bitsandbytes",
            f"{node.host}: has no binary for torch's CUDA {node.torch_cuda} (only {', '.join(node.bnb_binaries) or 'none'})",
            "install a bitsandbytes and a torch of one CUDA version; 16 bit works without",
        )


def check_limits(node: NodeFacts) -> Iterator[Finding]:
    """Check shared memory and open files."""
    if node.shm_gib is None or node.shm_gib < _MIN_SHM_GIB:
        size = "missing" if node.shm_gib is None else f"{node.shm_gib:.2f} GiB"
        yield warn(
            "/dev/shm",
            f"{node.host}: {size}",
            "give the container more, for example `--shm-size=8g`: Ray's objects and NCCL use it",
        )
    else:
        yield ok("/dev/shm", f"{node.host}: {node.shm_gib:.1f} GiB")
    if 0 <= node.open_files < _MIN_OPEN_FILES:
        yield warn(
            "open files", f"{node.host}: at most {node.open_files}", "raise the limit, for example `ulimit -n 65536`"
        )
    else:
        limit = "no limit" if node.open_files < 0 else f"at most {node.open_files:,}"
        yield ok("open files", f"{node.host}: {limit}")


def check_clock(node: NodeFacts) -> Iterator[Finding]:
    """Check the difference between a node's clock and this machine's."""
    if node.skew_s is None:
        return
    if abs(node.skew_s) > _MAX_SKEW_S:
        way = "before" if node.skew_s > 0 else "behind"
        yield warn(
            "clock", f"{node.host}: {abs(node.skew_s):.0f} s {way}", "run a time service (chrony, systemd-timesyncd)"
        )
    else:
        yield ok("clock", f"{node.host}: within {_MAX_SKEW_S:g} s")


def check_disk(host: str, disk: Disk) -> Finding:
    """Check free space of a folder, and that it can be written."""
    words = f"{host}: {disk.path} has {disk.free_gib:.1f} GiB free"
    if disk.problem:
        advice = "give another folder, or change its owner or mode"
        return fault("disk", f"{host}: {disk.path} cannot be written ({disk.problem})", advice, ConfigError)
    if disk.free_gib < _MIN_FREE_GIB:
        return fault("disk", words, "free disk space, or give a folder on another disk")
    if disk.free_gib < _LOW_FREE_GIB or disk.used_share > _FULL_SHARE:
        return warn(
            "disk", f"{words}, {disk.used_share:.0%} used", "free disk space: checkpoints and Ray's objects need it"
        )
    return ok("disk", words)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2])
