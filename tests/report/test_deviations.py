"""Settings of runs that are not the paper's are listed, each once."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_results import make_evaluation, make_training

from finlora.configfile import config_to_tree, load_config
from finlora.report.deviations import deviation_table, list_deviations
from finlora.report.pairing import pair_results

CONFIGS = Path(__file__).resolve().parents[2] / "jobs" / "configs"


def deviations_of(row):
    config = load_config(CONFIGS / f"{row}.yaml")
    return {
        setting: (papers, ours) for setting, papers, ours in list_deviations(config_to_tree(config), config.data.tasks)
    }


@pytest.mark.parametrize("row", ["llama-8b-4bit-r4-fpb", "llama-8b-8bit-r8-ner", "llama-8b-4bit-r4-xbrl"])
def test_llama_rows_deviate_in_optimiser_and_scoring_alone(row):
    found = deviations_of(row)
    assert found.pop("optim.name") == ("zero_one_adam", "adamw")
    assert found == ({} if row.endswith("xbrl") else {"eval.method": ("generate", "labels")})


def test_public_rows_say_what_they_change():
    found = deviations_of("smollm2-135m-4bit-r4-headline")
    assert found["optim.learning_rate"] == ("0.0001", "0.0005")
    assert found["data.max_train_examples"] == ("all", "32000")
    assert found["model.base"] == ("Llama-3.1-8B-Instruct", "real-base")
    assert found["train.epochs"] == ("4", "1")


def test_table_names_a_setting_once_with_its_tasks_and_no_others():
    config = {"optim": {"learning_rate": 5e-4}, "eval": {"bits": 4}}
    results = [
        make_training(task="ner", config=config, adapter="/a/adapter"),
        make_training(task="fpb", config=config, adapter="/b/adapter"),
        make_evaluation(task="tfns", config=config),
        make_training(task="synthetic", config=config, adapter="/c/adapter"),
    ]
    assert deviation_table(pair_results(results)).rows == (
        ("optim.learning_rate", "0.0001", "0.0005", "ner, fpb"),
        ("eval.bits", "8", "4", "tfns"),
    )
