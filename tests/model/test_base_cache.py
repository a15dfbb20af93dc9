"""A base read from the cache equals the quantised one, bit for bit; it is written once, and completely or not at all."""

from __future__ import annotations

import dataclasses
import re
import shutil
import threading
import time

import pytest
import torch

from finlora.config import ModelConfig
from finlora.errors import ModelError, ResourceError
from finlora.model import base as base_module
from finlora.model.base import load_base, quiet_bitsandbytes

CPU = torch.device("cpu")
IDS = torch.arange(60).reshape(3, 20) + 5


def load(folder, bits, cache, **settings):
    span = settings.pop("span", None)
    seed = settings.pop("seed", 0)
    return load_base(ModelConfig(base=str(folder), cache=cache and str(cache), **settings), bits, CPU, seed, span)


@pytest.fixture
def loads(monkeypatch):
    """Count the layers that are quantised."""
    counted = []
    quantise = base_module.quantise

    def count(*arguments):
        counted.append(threading.get_ident())
        return quantise(*arguments)

    monkeypatch.setattr(base_module, "quantise", count)
    return counted


@pytest.mark.parametrize("weights", ["pretrained", "random"])
@pytest.mark.parametrize("bits", [8, 4])
def test_base_read_back_computes_the_same_without_quantising(tiny_base, tmp_path, loads, bits, weights):
    with quiet_bitsandbytes(), torch.inference_mode():
        plain = load(tiny_base, bits, None, weights=weights)
        written = load(tiny_base, bits, tmp_path / "cache", weights=weights)
        num_quantised = len(loads)
        read = load(tiny_base, bits, tmp_path / "cache", weights=weights)
        assert len(loads) == num_quantised == 2 * 14
        assert [base.is_cached for base in (plain, written, read)] == [False, False, True]
        told = rf"Base: 0\.00 GiB at {bits} bit, (made from the model's files|read from the cache) in \d+\.\d s\."
        assert [re.fullmatch(told, base.describe_loading())[1][:4] for base in (plain, written, read)] == [
            "made",
            "made",
            "read",
        ]
        for other in (written, read):
            assert other.weights_gib == plain.weights_gib
            parameters = dict(other.model.named_parameters())
            for name, parameter in plain.model.named_parameters():
                assert torch.equal(parameter, parameters[name]), name
        expected = plain.model(IDS).logits
        assert torch.equal(read.model(IDS).logits, expected)
        assert torch.equal(written.model(IDS).logits, expected)


def test_cache_has_the_modes_of_the_umask(tiny_base, tmp_path, file_mode):
    with quiet_bitsandbytes():
        load(tiny_base, 4, tmp_path)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()} == {file_mode}


def test_training_on_a_cached_base_is_the_same(tiny_base, tmp_path):
    """The packed path joins the rows of quantised layers, here read from the file."""
    from finlora.config import LoraConfig
    from finlora.data.encode import Encoded
    from finlora.data.packing import pack_examples
    from finlora.model.layers.packed_model import PackedLlama
    from finlora.model.lora import attach_lora

    pack = pack_examples([Encoded(prompt_ids=tuple(range(5, 30)), answer_ids=(3, 4))], share_prefix=True)
    losses = []
    with quiet_bitsandbytes():
        for cache in (None, tmp_path, tmp_path):
            net = load(tiny_base, 4, cache).model
            model = attach_lora(net, LoraConfig(), str(tiny_base), 0).eval()
            losses.append(float(PackedLlama(model, torch.float32)(pack).detach()))
    assert losses[0] == losses[1] == losses[2]


def test_cache_is_kept_apart_by_bits_seed_and_type(tiny_base, tmp_path):
    types = ({"compute_dtype": "bfloat16"}, {"compute_dtype": "float32"})
    for settings in (*types, {"weights": "random"}, {"weights": "random", "seed": 1}):
        load(tiny_base, 4, tmp_path, **settings)
    load(tiny_base, 8, tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 5
    load(tiny_base, 16, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_span_of_layers_is_read_from_a_whole_cache_and_writes_none(tiny_base, tmp_path, loads):
    load(tiny_base, 4, tmp_path, span=range(1))
    assert list(tmp_path.iterdir()) == []
    whole = load(tiny_base, 4, tmp_path)
    del loads[:]
    part = load(tiny_base, 4, tmp_path, span=range(1, 2))
    assert loads == []
    assert part.model.model.layers[0].self_attn.q_proj.weight.is_meta
    own, other = (base.model.model.layers[1].mlp.down_proj.weight for base in (part, whole))
    assert torch.equal(own, other)


def test_processes_at_once_quantise_once(tiny_base, tmp_path, loads, monkeypatch):
    """Threads instead of processes: each opens the lock file itself, and flock locks by open file."""
    await_cache, quantise = base_module.await_cache, base_module.quantise
    asking, all_ask, times = [], threading.Event(), []

    def ask(cache):
        asking.append(cache)
        if len(asking) == 3:
            all_ask.set()
        return await_cache(cache)

    def quantise_once_all_ask(*arguments):  # else a late thread would find a finished cache and not wait
        assert all_ask.wait(300)
        times.append(time.monotonic())
        return quantise(*arguments)

    monkeypatch.setattr(base_module, "await_cache", ask)
    monkeypatch.setattr(base_module, "quantise", quantise_once_all_ask)
    bases = []
    threads = [threading.Thread(target=lambda: bases.append(load(tiny_base, 4, tmp_path))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 14
    assert len(set(loads)) == 1
    (writer,) = [base for base in bases if not base.is_cached]
    readers = [base for base in bases if base.is_cached]
    assert len(readers) == 2
    seconds = times[-1] - times[0]
    assert all(base.waited_seconds >= seconds for base in readers)
    assert writer.load_seconds >= seconds  # of the writer it is work
    late = dataclasses.replace(writer, is_cached=True, load_seconds=5.94, waited_seconds=17.62)
    words = "at 4 bit, read from the cache in 5.9 s, after a wait of 17.6 s for another process that wrote it."
    assert late.describe_loading().endswith(words)


def test_damaged_cache_is_refused_by_name(tiny_base, tmp_path):
    load(tiny_base, 4, tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    path = folder / "layer-1.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"layer-1.safetensors is missing or not of its \d+ bytes.* delete .*4bit"):
        load(tiny_base, 4, tmp_path)
    shutil.rmtree(folder)
    load(tiny_base, 4, tmp_path)
    assert folder.is_dir()


def test_flipped_bit_in_a_cache_is_refused_and_a_damaged_list_is_written_again(tiny_base, tmp_path, loads):
    load(tiny_base, 4, tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    path = folder / "layer-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"layer-1.safetensors has changed since it was written: delete .*4bit"):
        load(tiny_base, 4, tmp_path)
    (folder / "cache.json").write_text((folder / "cache.json").read_text()[:-9])
    del loads[:]
    load(tiny_base, 4, tmp_path)
    assert len(loads) == 14


def test_interrupted_write_leaves_nothing_that_is_read(tiny_base, tmp_path, monkeypatch, loads):
    import safetensors.torch

    save = safetensors.torch.save_file

    def fail(tensors, path):
        if path.endswith("layer-1.safetensors"):
            raise OSError(28, "No space left on device")
        save(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(ResourceError, match=r"could not be written .*No space left.* model.cache=null"):
            load(tiny_base, 4, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    load(tiny_base, 4, tmp_path)
    assert len(loads) == 2 * 14


def test_unusable_folder_is_refused_with_a_message(tiny_base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"model.cache=.*file cannot be used .* or null"):
        load(tiny_base, 4, tmp_path / "file")
