"""The processor's best number type, measured, and environment variables for torch's CPU threads and kernels.

bfloat16 halves memory traffic where the processor multiplies it (AMX-BF16, AVX512_BF16). Without these units oneDNN emulates it:
1.3 to 2.0 GFLOP/s a core on an AVX2 EPYC, where float32 reaches 48 to 64.
"""

from __future__ import annotations

import functools
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

Dtype = Literal["bfloat16", "float32"]

_POLICY, _SPIN = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"

ENVIRONMENT = {
    # OpenMP threads sleep while they wait. By default they spin, which takes the core from whoever they wait for: beside other
    # work 20 small training steps took 99.9 s instead of 14.7.
    _POLICY: "passive",
    # They spin 0.1 to 0.3 ms first, since the next parallel region often comes that soon: small steps take a quarter less time
    # on a quiet machine, and as long as before beside two busy loops. GNU's OpenMP reads it in the policy's stead.
    _SPIN: "5000",
    # oneDNN keeps a kernel for each shape that it meets, and packs and micro-batches are of all sizes. Its default of 1,024
    # kernels cost a training a gigabyte and, past 100 steps of the demo, half the speed.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32",
}
"""Torch's libraries read it once: it must be set before torch is imported."""

_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""In the driver of a submitted job, holds the job's config."""
_UNITS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512_BF16"}
"""Flag in /proc/cpuinfo -> name of the unit."""
_SIZE = 256
_REPEATS = 5


class Choice(NamedTuple):
    """Number type for everything that this processor computes, and the reason."""

    dtype: Dtype
    reason: str
    """`this CPU has neither AMX-BF16 nor AVX512_BF16`."""


def set_environment() -> None:
    """Set ENVIRONMENT for this process and its children, except what the user has set."""
    for name, value in missing_environment().items():
        os.environ[name] = value


def worker_environment() -> dict[str, str]:
    """Return this process's values of ENVIRONMENT, for workers: a cluster's inherit those of `ray start` otherwise.

    Leaves out variables that a submitted job sets: Ray refuses one that is set twice.
    """
    job = json.loads(os.environ.get(_JOB, "{}"))
    given = (job.get("runtime_env") or {}).get("env_vars") or {}
    known = {**os.environ, **missing_environment()}
    return {name: known[name] for name in _list_unset(given) if name in known}


def missing_environment() -> dict[str, str]:
    """Return the variables of ENVIRONMENT that this process lacks, without the spin where the user has set a policy."""
    return _list_unset(os.environ)


def _list_unset(there: Collection[str]) -> dict[str, str]:
    unset = {name: value for name, value in ENVIRONMENT.items() if name not in there}
    if _POLICY in there:
        unset.pop(_SPIN, None)
    return unset


@functools.cache
def choose_dtype() -> Choice:
    """Return the type in which this processor multiplies matrices faster, by its flags and a measurement.

    A processor that claims a unit is measured too: a virtual machine or ONEDNN_MAX_CPU_ISA may hide it.
    """
    flags = read_flags()
    units = [name for flag, name in _UNITS.items() if flag in flags]
    if flags and not units:
        return Choice("float32", f"this CPU has neither {' nor '.join(_UNITS.values())}")
    ratio = measure_bfloat16()
    if ratio >= 1:
        return Choice("bfloat16", f"this CPU has {' and '.join(units)}" if units else _describe(ratio))
    return Choice("float32", _describe(ratio))


def read_flags() -> frozenset[str]:
    """Return the processor's x86 flags in /proc/cpuinfo; empty on other architectures."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def measure_bfloat16() -> float:
    """Return how many times faster a bfloat16 product is than a float32 one, the best of a few each; at most 0.2 s."""
    import torch

    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
        multiply = functools.partial(torch.mm, matrix, matrix)
        seconds.append(min(_time(multiply) for _ in range(_REPEATS)))
    return seconds[0] / seconds[1]


def _time(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _describe(ratio: float) -> str:
    times, way = (ratio, "faster") if ratio >= 1 else (1 / ratio, "slower")
    return f"bfloat16 products are {times:.{0 if times >= 10 else 1}f} times {way} than float32 ones here"
