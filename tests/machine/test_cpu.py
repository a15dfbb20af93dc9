"""Number type of simulated processors, and the environment of Ray's workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from finlora.machine import cpu

AVX2 = {"avx", "avx2", "fma"}
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "5000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}


@pytest.fixture
def choose(monkeypatch):
    """Choose for a processor with these flags and this speed of bfloat16; None: it must not be measured."""

    def build(flags, ratio):
        def measure():
            assert ratio is not None, "measured where the flags say all"
            return ratio

        monkeypatch.setattr(cpu, "read_flags", lambda: frozenset(flags))
        monkeypatch.setattr(cpu, "measure_bfloat16", measure)
        return cpu.choose_dtype()

    cpu.choose_dtype.cache_clear()
    yield build
    cpu.choose_dtype.cache_clear()


@pytest.mark.parametrize(
    ("flags", "ratio", "dtype", "reason"),
    [
        (AVX2, None, "float32", "this CPU has neither AMX-BF16 nor AVX512_BF16"),
        ({*AVX2, "avx512f", "avx512_vnni"}, None, "float32", "this CPU has neither AMX-BF16 nor AVX512_BF16"),
        ({*AVX2, "avx512_bf16"}, 1.9, "bfloat16", "this CPU has AVX512_BF16"),
        ({*AVX2, "avx512_bf16", "amx_bf16"}, 6.0, "bfloat16", "this CPU has AMX-BF16 and AVX512_BF16"),
        # ONEDNN_MAX_CPU_ISA=AVX2, or a virtual machine.
        (
            {*AVX2, "avx512_bf16", "amx_bf16"},
            0.02,
            "float32",
            "bfloat16 products are 50 times slower than float32 ones here",
        ),
        # Another architecture shows no flags.
        (set(), 1.6, "bfloat16", "bfloat16 products are 1.6 times faster than float32 ones here"),
        (set(), 0.5, "float32", "bfloat16 products are 2.0 times slower than float32 ones here"),
    ],
)
def test_type_follows_the_processors_units(choose, flags, ratio, dtype, reason):
    assert choose(flags, ratio) == (dtype, reason)


def test_measurement_compares_the_fastest_products(monkeypatch):
    """A measurement that another process delayed is ignored."""
    seconds = iter([5.0, 2.0, 900.0, 3.0, 4.0, 0.25, 0.5, 0.75, 0.5, 800.0])
    products = []

    def time(run):
        products.append(run())
        return next(seconds)

    monkeypatch.setattr(cpu, "_time", time)
    assert cpu.measure_bfloat16() == 8.0
    assert [product.dtype for product in products] == [torch.float32] * 5 + [torch.bfloat16] * 5


def test_environment_is_set_but_for_what_the_user_has_set(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    cpu.set_environment()
    assert {name: os.environ[name] for name in ENVIRONMENT} == {**ENVIRONMENT, "GOMP_SPINCOUNT": "7"}
    assert cpu.missing_environment() == {}
    assert cpu.worker_environment() == {**ENVIRONMENT, "GOMP_SPINCOUNT": "7"}


def test_users_policy_of_waiting_is_not_overruled_by_a_spin_count(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    cpu.set_environment()
    assert "GOMP_SPINCOUNT" not in os.environ
    assert cpu.missing_environment() == {}
    own = {"OMP_WAIT_POLICY": "active", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
    assert cpu.worker_environment() == own


def test_workers_of_a_job_get_what_the_job_does_not_bring_itself(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    assert cpu.worker_environment() == ENVIRONMENT
    job = {"runtime_env": {"working_dir": "gcs://x.zip", "env_vars": {"OMP_WAIT_POLICY": "active"}}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    assert cpu.worker_environment() == {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32"}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {}}))
    assert cpu.worker_environment() == ENVIRONMENT


def test_command_sets_its_environment_before_torch_is_imported():
    """libgomp reads the variable as it is loaded; torch loads it."""
    code = (
        "import os, sys, finlora.cli.main as main\n"
        "assert 'torch' not in sys.modules\n"
        "assert 'OMP_WAIT_POLICY' not in os.environ\n"
        "main.app = lambda **_: sys.exit(os.environ['OMP_WAIT_POLICY'])\n"
        "main.main(['--help'])"
    )
    bare = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", code], env=bare, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "passive\n")
