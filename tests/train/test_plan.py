"""Verdicts of a forecast: it fits, one setting makes it fit, several do, none does."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from finlora.errors import ConfigError, ResourceError
from finlora.formula.llama import LLAMA_8B
from finlora.train import plan as module
from finlora.train.plan import (
    REFERENCE_GPU_GIB,
    count_gpus,
    explain_out_of_memory,
    find_memory_gib,
    plan_run,
    print_plan,
)
from finlora.train.run.run_folder import load_training_set


@pytest.fixture
def make_8b(make_config, tiny_base, tmp_path):
    """A run of Llama-3.1-8B's shapes without weights on the generated set, on padded rows unless told otherwise."""
    folder = tmp_path / "llama-8b"
    folder.mkdir()
    values = json.loads((tiny_base / "config.json").read_text())
    values |= {
        "hidden_size": LLAMA_8B.hidden_size,
        "intermediate_size": LLAMA_8B.intermediate_size,
        "num_hidden_layers": LLAMA_8B.num_layers,
        "num_attention_heads": LLAMA_8B.num_heads,
        "num_key_value_heads": LLAMA_8B.num_kv_heads,
        "head_dim": LLAMA_8B.head_dim,
        "vocab_size": LLAMA_8B.vocab_size,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(values))
    fixed = [f"model.base={folder}", f"model.tokenizer={tiny_base}", "model.weights=random"]
    fixed += ["model.compute_dtype=bfloat16", "train.precision=bf16", "train.device=cuda", "model.bits=4"]
    fixed += ["train.packing=false", "data.max_train_examples=400"]  # each plan encodes them again

    def make(*overrides):
        return make_config(*fixed, *overrides)

    return make


def test_run_that_fits_says_how_much_it_takes(make_8b):
    verdict = plan_run(make_8b("train.micro_batch_size=4"), 47.4, 1)
    assert verdict.fits
    assert verdict.settings == ()
    assert verdict.words == f"It fits: {verdict.plan.total_gib:.1f} GiB per worker, 5% kept free of 47.4 GiB."
    verdict.require_fit()


def memory_between(make_8b, small, large):
    """GiB in the middle between the needs of two configs."""
    needs = [plan_run(make_8b(*overrides), 10_000, 1).plan.total_gib * 1.05 for overrides in (small, large)]
    assert needs[0] < needs[1]
    return sum(needs) / 2


CHECKPOINTED = "train.gradient_checkpointing=true"


@pytest.mark.parametrize(
    ("found", "remedies", "settings"),
    [
        (["train.micro_batch_size=16"], [CHECKPOINTED], (CHECKPOINTED,)),
        (
            ["train.micro_batch_size=16", CHECKPOINTED],
            ["train.micro_batch_size=8", CHECKPOINTED],
            ("train.micro_batch_size=8",),
        ),
        (
            ["train.micro_batch_size=2", "model.bits=8"],
            ["train.micro_batch_size=2", CHECKPOINTED, "model.bits=4"],
            (CHECKPOINTED, "model.bits=4"),
        ),
    ],
)
def test_first_setting_that_makes_it_fit_is_named(make_8b, found, remedies, settings):
    if "model.bits=8" in found:
        memory = memory_between(make_8b, remedies, ["train.micro_batch_size=1", CHECKPOINTED, "model.bits=8"])
    else:
        memory = memory_between(make_8b, [*found, *remedies], found)
    verdict = plan_run(make_8b(*found), memory, 1)
    assert not verdict.fits
    assert verdict.settings == settings
    with pytest.raises(ResourceError, match=rf"It does not fit: .*{settings[-1]} makes it fit at"):
        verdict.require_fit()
    assert plan_run(make_8b(*found, *settings), memory, 1).fits


def test_length_limit_comes_last_and_says_what_it_loses(make_8b):
    needs = ["data.tasks=[synthetic_xbrl]", "train.micro_batch_size=1", "train.global_batch_size=4", CHECKPOINTED]
    config = make_8b(*needs)
    full = plan_run(config, 10_000, 1).plan
    limit = full.micro_batch.num_tokens // 64 * 64
    shorter = plan_run(make_8b(*needs, f"model.max_seq_len={limit}", "data.too_long=skip"), 10_000, 1).plan
    memory = (full.total_gib + shorter.total_gib) / 2 * 1.05
    verdict = plan_run(config, memory, 1)
    assert verdict.settings[0].startswith("model.max_seq_len=")
    assert verdict.settings[1] == "data.too_long=skip"
    assert "which leaves out" in verdict.words


def test_base_that_is_too_large_for_any_setting_says_so(make_8b):
    verdict = plan_run(make_8b(), 4.0, 1)
    assert not verdict.fits
    assert verdict.settings == ()
    with pytest.raises(ResourceError, match=r"neither gradient checkpointing.*Use larger GPUs or a smaller base"):
        verdict.require_fit()


def test_missing_gpus_name_the_number_of_workers_that_runs(make_8b):
    verdict = plan_run(make_8b("train.num_workers=4"), 80.0, 3)
    assert verdict.settings == ("train.num_workers=3",)
    with pytest.raises(ResourceError, match=r"needs 4 GPUs and 3 are there: set train.num_workers=3"):
        verdict.require_fit()


def test_workers_that_share_a_gpu_share_its_memory(make_8b):
    config = make_8b("train.num_workers=2", "train.gpus_per_worker=0.5")
    assert count_gpus(config) == 1
    assert plan_run(config, 40.0, 1).gpu_memory_gib == 20.0


@pytest.mark.parametrize(("memory", "num_gpus"), [(0.0, 1), (48.0, 0)])
def test_senseless_machine_is_refused(make_8b, memory, num_gpus):
    with pytest.raises(ConfigError, match=r"expected more than 1\.3 GiB on at least one"):
        plan_run(make_8b(), memory, num_gpus)


def test_memory_is_the_machines_or_the_reference_cards(monkeypatch):
    assert find_memory_gib("cpu") > 0.5
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert find_memory_gib("cuda") == REFERENCE_GPU_GIB


def test_table_shows_every_part_and_the_longest_batch(make_8b):
    config = make_8b("train.micro_batch_size=4")
    verdict = plan_run(config, 47.4, 1)
    console = Console(width=120, record=True, file=io.StringIO())
    print_plan(config, verdict, console)
    text = console.export_text()
    for word in ("weights", "adapter", "optimizer", "activations", "peak of loading", "total", "GPU", "4 x "):
        assert word in text
    assert f"{verdict.plan.total_gib:.2f}" in text
    assert f"{verdict.plan.micro_batch.num_tokens:,} padded tokens" in text


def test_plan_needs_no_ray():
    assert "ray" not in vars(module)


def test_training_set_at_hand_is_not_read_again(make_8b, monkeypatch):
    config = make_8b()
    training_set, expected = load_training_set(config), plan_run(config, 47.4, 1)
    monkeypatch.setattr(module, "load_training_set", lambda *_: pytest.fail("it was read again"))
    assert plan_run(config, 47.4, 1, training_set) == expected


@pytest.mark.parametrize(
    ("overrides", "advice"),
    [
        (
            ["model.bits=8", "train.micro_batch_size=4"],
            "set train.gradient_checkpointing=true or train.micro_batch_size=2 or model.bits=4, under another `name`",
        ),
        (["model.bits=4", "train.micro_batch_size=1"], "set train.gradient_checkpointing=true, under another `name`"),
        (
            ["model.bits=4", "train.micro_batch_size=1", "train.gradient_checkpointing=true"],
            "use a larger GPU or shorter examples",
        ),
    ],
)
def test_gpu_that_ran_out_of_memory_names_what_saves_some(make_8b, overrides, advice):
    found = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 47.40 GiB of which 1.00 GiB is free. "
        "Process 1 has 46.40 GiB memory in use. Of the allocated memory 45 GiB is allocated by PyTorch."
    )
    error = explain_out_of_memory(make_8b(*overrides), found, None)
    assert isinstance(error, ResourceError)
    assert (
        f"Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 47.40 GiB of which 1.00 GiB is free): {advice}"
        in str(error)
    )


PACKED = "train.packing=true"
RESTRICTED = ("train.recompute=none", "train.unpack_weights=always")


def test_packed_run_says_how_it_trains_and_that_it_fits(make_8b):
    config = make_8b(PACKED)
    verdict = plan_run(config, 47.4, 1)
    assert verdict.fits
    assert verdict.padded_because is None
    rows = verdict.packs.size.num_rows
    expected = (
        f"Training packed: largest pack {rows:,} tokens; frozen base at 4 bit, held unpacked in memory; "
        f"forecast {verdict.plan.train_peak_gib:.2f} GiB per worker"
    )
    assert verdict.describe(config) == expected
    console = Console(width=130, record=True, file=io.StringIO())
    print_plan(config, verdict, console)
    text = console.export_text()
    assert "held unpacked in memory" in text
    assert f"largest pack {rows:,} tokens" in text


def test_padded_run_says_why(make_8b):
    verdict = plan_run(make_8b(), 1000, 1)
    assert verdict.packs is None
    assert verdict.describe(make_8b()).startswith("Training on padded rows (train.packing=false): 4 x ")


def test_all_projections_train_packed(make_8b):
    config = make_8b(PACKED, "lora.target_modules=[q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj]")
    verdict = plan_run(config, 47.4, 1)
    assert verdict.fits
    assert verdict.describe(config).startswith("Training packed")


def test_less_memory_is_planned_for_before_anything_is_refused(make_8b):
    """From ample to scarce: unpacked weights go first, then activations are computed again."""
    plans = [plan_run(make_8b(PACKED), memory, 1) for memory in (60.0, 17.0, 9.0)]
    assert all(verdict.fits for verdict in plans)
    assert [verdict.packs.keep_unpacked for verdict in plans] == [True, False, False]
    costs = [verdict.packs.cost for verdict in plans]
    assert costs == sorted(costs)
    assert plan_run(make_8b(PACKED, "train.memory_gib=9"), 60.0, 1).packs == plans[2].packs


@pytest.mark.parametrize(
    ("restricted", "memory", "settings"),
    [
        (RESTRICTED, 15.0, ("train.recompute=auto", "train.unpack_weights=auto")),
        (["model.bits=8"], 9.5, ("model.bits=4",)),
    ],
)
def test_setting_that_makes_a_packed_run_fit_is_named(make_8b, restricted, memory, settings):
    verdict = plan_run(make_8b(PACKED, *restricted), memory, 1)
    assert not verdict.fits
    assert verdict.settings == settings
    with pytest.raises(ResourceError, match=rf"{settings[-1]} makes it fit at"):
        verdict.require_fit()
    assert plan_run(make_8b(PACKED, *restricted, *settings), memory, 1).fits


def test_packed_run_that_nothing_makes_fit_says_so(make_8b):
    words = r"neither recomputing activations, 4 bit nor shorter examples make it fit"
    with pytest.raises(ResourceError, match=words):
        plan_run(make_8b(PACKED), 4.0, 1).require_fit()


def test_packed_run_out_of_memory_names_a_limit_under_which_it_resumes(make_8b):
    config = make_8b(PACKED)
    packs = plan_run(config, 47.4, 1).packs
    said = str(explain_out_of_memory(config, "CUDA out of memory. Tried. Free", packs))
    assert f"set train.memory_gib={packs.memory.total_gib * 0.9:.1f}, which makes packs smaller" in said
    assert "it resumes from the last checkpoint" in said


def test_dora_says_why_it_trains_on_padded_rows_and_what_it_takes(make_8b):
    plain, dora = (make_8b("train.packing=false"), make_8b(PACKED, "lora.dora=true"))
    found = [plan_run(config, 47.4, 1) for config in (plain, dora)]
    assert found[1].packs is None
    assert found[1].plan.activations_gib > found[0].plan.activations_gib
    assert found[1].plan.adapter_gib > found[0].plan.adapter_gib
    console = Console(width=160, record=True, file=io.StringIO())
    print_plan(dora, found[1], console)
    words = "Trains on padded rows, which takes more time and memory than packs: lora.dora=true, which scales the base's products"
    assert words in console.export_text()


def test_start_of_a_rank_beyond_the_weights_is_refused_before_a_base_is_loaded(make_8b):
    config = make_8b(PACKED, "model.bits=16", "lora.init=pissa", "lora.rank=1025")
    with pytest.raises(ConfigError, match=r"lora\.init=pissa: rank 1025 of k_proj: expected at most 1024"):
        plan_run(config, 47.4, 1)
    fitting = make_8b(PACKED, "model.bits=16", "lora.init=pissa")
    assert plan_run(fitting, 47.4, 1).plan.adapter_file_mib > 1.9 * plan_run(make_8b(), 47.4, 1).plan.adapter_file_mib
