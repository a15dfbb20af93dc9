"""Kernels compiled ahead: which passes run, what is said, and that nothing is compiled twice; with an emulated GPU."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from emulated_flash import emulate_attention
from emulated_graphs import emulate_graphs
from emulated_triton import emulated_kernels

from finlora.cli.main import main
from finlora.errors import ResourceError
from finlora.inference import open_base, warm_kernels
from finlora.inference.warm_kernels import count_kernels, list_facts, require_gpu, shorten, warm_base
from finlora.machine.kernel_folder import VARIABLE
from finlora.model.base_files import read_base_files


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An emulated GPU, micro-batches that its CPU can compute, and a folder of kernels."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "kernels"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_device: "an emulated GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(warm_kernels, "require_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(warm_kernels, "choose_batch_rows", lambda _in_flight: 16)
    monkeypatch.setattr(warm_kernels, "ALL_BITS", (16, 4))
    monkeypatch.setattr(warm_kernels, "_PACKS", ((2, 12, 1),))
    # Every shape of micro-batches is tried in tests/stage/test_stage_kernels.py.
    monkeypatch.setattr(open_base, "PROMPT_SIZES", (16,))
    monkeypatch.setattr(open_base, "DECODE_SIZES", (1, 2))
    emulate_graphs(monkeypatch)
    emulate_attention(monkeypatch)
    with emulated_kernels() as kernels:
        sys.modules["triton"].__version__ = "3.9.0"
        yield kernels


def test_each_use_is_warmed_once(gpu, make_config, tmp_path):
    config = make_config("model.compute_dtype=bfloat16")
    files, said = read_base_files(config.model), []
    first = warm_base(config, files, said.append)
    assert [warmed.use for warmed in first] == [
        *("training at 16 bit", "answering at 16 bit", "training at 4 bit", "answering at 4 bit")
    ]
    assert said == first
    assert not any(warmed.is_known for warmed in first)
    for module in (gpu.norm_steps, gpu.elementwise_steps, gpu.rms_norm):
        assert any(getattr(kernel, "launches", None) for kernel in vars(module).values()), module.__name__
    again = warm_base(config, files, said.append)
    assert all(warmed.is_known and warmed.seconds < 1 for warmed in again)
    assert again[0].describe() == "training at 16 bit: compiled before"
    other = warm_base(make_config("model.compute_dtype=bfloat16", "lora.dropout=0.0"), files, said.append)
    assert not other[0].is_known  # other kernels of the same base
    assert files.source.shards  # the base itself is as it was
    assert files.shape.num_layers == shorten(files).shape.num_layers


def test_kernels_are_counted_by_file(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/x.cubin", "a/b/y.cubin", "a/z.json"):
        (tmp_path / name).write_text("")
    assert count_kernels(tmp_path) == 2
    warmed = warm_kernels.Warmed("training at 4 bit", 2, 3.21, False)
    assert warmed.describe() == "training at 4 bit: 2 kernels compiled in 3.2 s"


def test_facts_need_no_installed_package(monkeypatch):
    """As in a job whose working directory holds the code: FinLoRA is on the path, and not installed."""

    def missing(name):
        raise AssertionError(f"asks for the metadata of {name}")

    monkeypatch.setattr("importlib.metadata.version", missing)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_device: (8, 6))
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.9.0"))
    assert list_facts(torch.device("cuda:0")) == {
        "compute capability": "8.6",
        "torch": torch.__version__,
        "triton": "3.9.0",
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_a_gpu_is_refused_before_anything_is_read(capsys):
    with pytest.raises(
        ResourceError, match="torch sees no GPU here, and kernels are compiled for the GPU of a machine"
    ):
        require_gpu()
    with pytest.raises(SystemExit) as stop:
        main(["warm", "model.base=/not/there"])
    assert stop.value.code == ResourceError.exit_code
    assert "run `finlora warm` where the base will be used" in " ".join(capsys.readouterr().err.split())
