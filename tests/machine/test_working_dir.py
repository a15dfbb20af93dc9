"""Upload of `ray job submit --working-dir .`: small, complete, and without data, weights or the environment."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Ray's own limit is 512 MiB; a laptop behind a slow line should not notice the upload.
LARGEST = 3 * 2**20
LEFT_BEHIND = (
    *(
        ".venv/lib/torch.so",
        ".git/objects/pack",
        ".demo/base/model.safetensors",
        "runs/x/adapter/adapter_model.safetensors",
    ),
    *("data/fpb/train.parquet", "tests/test_x.py", "docs/page.md", "cluster/x.yaml", "base/pytorch_model.bin"),
)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """Archive of a used checkout, made by Ray's code."""
    from ray._private.runtime_env.packaging import create_package

    folder = tmp_path_factory.mktemp("working-dir")
    checkout = folder / "checkout"
    junk = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, checkout, ignore=junk)
    for name in LEFT_BEHIND:
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(256)) * 40)
    shutil.copy(ROOT / ".rayignore", checkout)  # without .gitignore, which Ray can be set to ignore
    create_package(str(checkout), folder / "package.zip", include_gitignore=True, excludes=[])
    return folder / "package.zip"


def test_package_is_small(package):
    assert package.stat().st_size < LARGEST


def test_package_holds_code_jobs_and_configs_and_nothing_else(package):
    with zipfile.ZipFile(package) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "finlora").rglob("*.py")}
    jobs = {str(path.relative_to(ROOT)) for path in (ROOT / "jobs").rglob("*") if path.suffix in (".py", ".yaml")}
    assert modules | jobs <= names
    top = {name.partition("/")[0] for name in names}
    assert top <= {"finlora", "jobs", "serve_configs", "Makefile", "README.md", "pyproject.toml", "LICENSE"}
    assert names.isdisjoint(LEFT_BEHIND)
