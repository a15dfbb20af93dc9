"""Every shipped YAML loads and matches its name, and every row of the paper has one."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from finlora.configfile import load_config
from finlora.data.sets.catalog import TASKS

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "jobs" / "configs").glob("*.yaml"))
FAMILIES = ("llama-8b-4bit-r4", "llama-8b-8bit-r8", "llama-70b-4bit-r4")
# Column of the paper's tables -> prepared tasks. FiQA has two splits: the paper's scores fit the larger one.
TABLE_TASKS = {name: (name,) for name in ("fpb", "tfns", "nwgi", "headline", "ner")} | {
    "fiqa": ("fiqa_paper",),
    "xbrl": ("xbrl_tags", "xbrl_values"),
}
ROWS = [f"{family}-{task}" for family in FAMILIES for task in TABLE_TASKS]
BEYOND = {f"{family}-formulas": f"{family}-fpb" for family in FAMILIES}
"""Rows beyond the paper, each with a paper's row that has the same settings except name and task."""
PUBLIC = {
    **{f"smollm2-135m-4bit-r4-{task}": tasks for task, tasks in TABLE_TASKS.items() if task != "nwgi"},
    "smollm2-135m-4bit-r4-fiqa-clean": ("fiqa",),
    "smollm2-135m-4bit-r4-formulas": ("synthetic_formulas",),
    "smollm2-135m-4bit-r4-classification": ("fpb", "fiqa_paper", "tfns", "headline", "ner"),
}
"""Row on the public base -> its tasks. NWGI has no training rows here."""


README = (ROOT / "README.md").read_text(encoding="utf-8")


def config_of(name):
    return load_config(ROOT / "jobs" / "configs" / f"{name}.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_under_its_own_name(path):
    config = load_config(path)
    assert config.name == path.stem
    assert set(config.data.tasks) <= set(TASKS)
    assert path.read_text().startswith("# ")
    tree = yaml.safe_load(path.read_text())
    assert {"name", "model", "lora", "data", "optim", "train", "eval"} <= tree.keys()


def test_each_row_of_the_paper_has_its_config():
    assert sorted([*ROWS, *BEYOND, *PUBLIC, "demo-4bit-r4", "demo-real-4bit-r4", "own-table-cpu"]) == sorted(
        path.stem for path in CONFIGS
    )


@pytest.mark.parametrize(("name", "like"), BEYOND.items())
def test_row_beyond_the_paper_has_the_settings_of_one_of_its_rows(name, like):
    config, paper = config_of(name), config_of(like)
    assert config.data.tasks == ("synthetic_formulas",)
    assert config == dataclasses.replace(
        paper, name=name, data=dataclasses.replace(paper.data, tasks=config.data.tasks)
    )


@pytest.mark.parametrize("name", ROWS)
def test_config_does_what_its_name_says(name):
    _, size, bits, rank, task = name.split("-")
    config = config_of(name)
    assert config.model.base == f"meta-llama/Llama-3.1-{size.upper()}-Instruct"
    assert f"{config.model.bits}bit" == bits
    assert f"r{config.lora.rank}" == rank
    assert config.data.tasks == TABLE_TASKS[task]


@pytest.mark.parametrize("name", ROWS)
def test_config_has_the_papers_settings(name):
    """LoRA alpha 32, dropout 0.1, rate 1e-4 on q, k and v; four GPUs; 4 epochs, XBRL 1; evaluated at 8 bit."""
    config = config_of(name)
    is_xbrl, is_large = name.endswith("xbrl"), "70b" in name
    assert (config.lora.alpha, config.lora.dropout, config.optim.learning_rate) == (32.0, 0.1, 1e-4)
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj")
    assert (config.optim.name, config.train.device, config.train.num_workers) == ("adamw", "cuda", 4)
    assert config.train.epochs == (1 if is_xbrl else 4)
    assert config.train.max_steps is None
    assert config.data.max_train_examples is None
    assert config.eval.bits == (4 if is_large else 8)  # 70B at 8 bit fits no single GPU of the reference machine
    assert config.model.max_seq_len == (8192 if is_xbrl else 1024)


@pytest.mark.parametrize(("name", "tasks"), PUBLIC.items())
def test_row_on_the_public_base_trains_on_one_gpu_and_scores_as_the_paper(name, tasks):
    config, demo = config_of(name), config_of("demo-real-4bit-r4")
    assert config.data.tasks == tasks
    assert config.model.base == demo.model.base
    assert (config.model.bits, config.lora.rank, config.lora.alpha, config.eval.bits) == (4, 4, 32.0, 8)
    assert (config.train.num_workers, config.train.device, config.train.gpus_per_worker) == (1, "cuda", 1.0)
    assert config.train.epochs <= 6


@pytest.mark.parametrize("task", TABLE_TASKS)
def test_rows_of_one_task_share_their_global_batch(task):
    """So that their scores differ only by base, bits and rank."""
    assert len({config_of(f"{family}-{task}").train.global_batch_size for family in FAMILIES}) == 1


def test_demo_runs_on_any_machine():
    config = config_of("demo-4bit-r4")
    assert (config.train.device, config.eval.device) == ("cpu", "cpu")
    assert (config.model.bits, config.lora.rank, config.data.tasks) == (4, 4, ("synthetic_sentiment",))
    assert not Path(config.output_dir).is_absolute()


def test_real_demo_is_the_small_ones_but_for_base_template_type_and_sizes():
    small, real = config_of("demo-4bit-r4"), config_of("demo-real-4bit-r4")
    assert (real.model.base, real.model.template) == (".demo/real-base", "chat")
    assert real.train == dataclasses.replace(small.train, epochs=1, precision="auto")
    assert real.eval == small.eval
    assert (real.data.dir, real.data.tasks) == (small.data.dir, ("synthetic_sentiment",))


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_job_script_says_how_to_run_it_and_compiles(path):
    source = path.read_text()
    compile(source, str(path), "exec")
    assert f"jobs/{path.name}" in source or f"make {path.stem}" in source


def test_readme_is_read_in_three_minutes():
    assert len(README.splitlines()) <= 110, "move what explains to docs/"


def test_readme_shows_pictures_that_are_there():
    pictures = re.findall(r'src(?:set)?="([^"]+)"|!\[[^]]*\]\(([^)]+)\)', README)
    paths = [html or markdown for html, markdown in pictures]
    assert len(paths) >= 3
    assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_readme_names_only_files_that_are_there():
    paths = re.findall(r"`((?:jobs|serve_configs|benchmarks|requirements|finlora|tests)/[\w./-]+)`", README)
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    ("installed", "given", "torch"),
    [
        (None, (), "cpu"),
        ("gpu", (), "gpu"),
        ("cpu", (), "cpu"),
        ("gpu", ("TORCH=cpu",), "cpu"),
        (None, ("TORCH=gpu",), "gpu"),
    ],
)
def test_make_keeps_the_build_of_torch_that_is_installed(tmp_path, installed, given, torch):
    """Regression: `make demo` after `make setup TORCH=gpu` installed the CPU build."""
    for name in ("Makefile", "requirements", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    if installed:
        (tmp_path / ".venv" / f".installed-{installed}").touch()
    done = subprocess.run(
        ["make", "-n", "demo", *given], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    installs = re.findall(r"requirements/torch-(\w+)\.lock", done.stdout)
    assert set(installs) == (set() if installed == torch else {torch})
