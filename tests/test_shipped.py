"""Every YAML that ships loads and does what its name says, and the paper's rows are all there."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from finlora.cli.main import app
from finlora.configfile import load_config
from finlora.data.catalog import TASKS
from finlora.serve.deploy import read_deployment
from finlora.train.space import load_search

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
"""Rows beyond the paper, and a row with the settings that they share but for name and task."""


README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = [line.split("  #")[0].strip() for line in README.splitlines() if line.startswith("    ")]


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
    assert sorted([*ROWS, *BEYOND, "demo-4bit-r4"]) == [path.stem for path in CONFIGS]


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


@pytest.mark.parametrize("task", TABLE_TASKS)
def test_rows_of_one_task_share_their_global_batch(task):
    """So that their scores differ by base, bits and rank alone."""
    assert len({config_of(f"{family}-{task}").train.global_batch_size for family in FAMILIES}) == 1


def test_demo_runs_on_any_machine():
    config = config_of("demo-4bit-r4")
    assert (config.train.device, config.eval.device) == ("cpu", "cpu")
    assert (config.model.bits, config.lora.rank, config.data.tasks) == (4, 4, ("synthetic",))
    assert not Path(config.output_dir).is_absolute()


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_job_script_says_how_to_run_it_and_compiles(path):
    source = path.read_text()
    compile(source, str(path), "exec")
    assert f"jobs/{path.name}" in source or f"make {path.stem}" in source


def verbs_shown():
    """Return the arguments of each `finlora` or job command that the README shows on a line of its own."""
    found = []
    for line in SHOWN:
        words = shlex.split(line)
        if words[:1] == ["finlora"]:
            found.append(words[1:])
        elif words[:3] == ["ray", "job", "submit"]:
            script, *rest = words[words.index("python") + 1 :]
            assert (ROOT / script).is_file()
            found.append([Path(script).stem, *rest])
    return found


def test_readme_shows_commands():
    assert {arguments[0] for arguments in verbs_shown()} >= {"prepare", "train", "evaluate", "report"}


@pytest.mark.parametrize("arguments", verbs_shown(), ids=" ".join)
def test_readme_command_parses_and_its_config_is_there(arguments):
    verb, *rest = arguments
    command = typer.main.get_command(app).commands[verb]
    values = command.make_context(verb, list(rest)).params  # raises on an unknown option or a missing argument
    if values.get("config"):
        load = {"serve": read_deployment, "tune": load_search}.get(verb, load_config)
        load(ROOT / values["config"], values["overrides"] or [])


def test_readme_names_only_verbs_targets_and_files_that_are_there():
    verbs = set(typer.main.get_command(app).commands)
    assert set(re.findall(r"`?finlora ([a-z]+)", README)) - verbs == set()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z]+)", README, flags=re.MULTILINE)) - targets == set()
    paths = re.findall(r"`((?:jobs|serve_configs|benchmarks|requirements|finlora|tests)/[\w./-]+)`", README)
    assert [path for path in paths if not (ROOT / path).exists()] == []
