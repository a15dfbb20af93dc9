"""Trials of a search: they depend only on its config, cover the space evenly and are checked before any starts."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml

from finlora.config import RunConfig
from finlora.errors import ConfigError
from finlora.train.search.space import OWN, SearchConfig, hash_search, load_search, sample_trials

SHIPPED = sorted((Path(__file__).resolve().parents[3] / "jobs" / "searches").glob("*.yaml"))


def test_first_trial_is_the_config_itself():
    config = RunConfig()
    first, *others = sample_trials(config, SearchConfig(num_trials=4))
    assert first.apply(config) == config
    assert first.name == "000-4bit-r4-1.00e-04"
    assert first.name.startswith(OWN)
    assert not any(trial.name.startswith(OWN) for trial in others)


def test_more_trials_begin_with_the_same_ones():
    few, many = (sample_trials(RunConfig(), SearchConfig(num_trials=number)) for number in (5, 40))
    assert many[:5] == few
    assert len({trial.name for trial in many}) == 40
    assert sample_trials(RunConfig(seed=1), SearchConfig(num_trials=5)) != few


def test_trials_cover_choices_and_rates_evenly():
    search = SearchConfig(num_trials=61, rank=(2, 4, 8), bits=(4, 8), learning_rate=(1e-5, 1e-2))
    trials = sample_trials(RunConfig(), search)[1:]
    for counts, num_choices in ((Counter(trial.rank for trial in trials), 3), (Counter(t.bits for t in trials), 2)):
        assert len(counts) == num_choices
        assert max(counts.values()) - min(counts.values()) <= 4
    decades = Counter(math.floor(math.log10(trial.learning_rate)) for trial in trials)
    assert set(decades) == {-5, -4, -3}
    assert max(decades.values()) - min(decades.values()) <= 4


def test_what_is_not_varied_stays_as_configured():
    search = SearchConfig(num_trials=3, rank=(), bits=(), learning_rate=())
    assert {(t.rank, t.bits, t.alpha, t.learning_rate) for t in sample_trials(RunConfig(), search)} == {
        (4, 4, 32.0, 1e-4)
    }
    varied = SearchConfig(num_trials=30, alpha=(16.0, 64.0), target_modules=("q_proj", "q_proj+v_proj"))
    trials = sample_trials(RunConfig(), varied)[1:]
    assert {trial.alpha for trial in trials} == {16.0, 64.0}
    assert {trial.target_modules for trial in trials} == {("q_proj",), ("q_proj", "v_proj")}
    assert trials[0].apply(RunConfig()).lora.alpha == trials[0].alpha


def test_section_is_read_beside_the_config(tmp_path):
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "lora": {"rank": 8}, "search": {"bits": [4], "num_trials": 9}}))
    config, search = load_search(path, ["search.learning_rate=[1e-4, 0.01]", "train.epochs=2"])
    assert (config.name, config.lora.rank, config.train.epochs) == ("s", 8, 2)
    assert search == SearchConfig(bits=(4,), num_trials=9, learning_rate=(1e-4, 0.01))


def test_every_fault_of_both_is_reported_at_once():
    faults = ["search.bits=[5]", "search.num_trials=0", "search.rnk=[1]", "lora.rank=0", "search.rank=4"]
    with pytest.raises(ConfigError) as caught:
        load_search(None, faults)
    text = str(caught.value)
    for words in (
        "search.bits=[5]: expected some of 16, 8 and 4",
        "search.num_trials=0",
        "search.rnk is not a setting: did you mean rank",
        "lora.rank=0",
        "search.rank=4: expected a list such as [4, 8]",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("search.learning_rate=[1e-3, 1e-4]", "expected the lowest and the highest"),
        ("search.objectives=[peak_memory_gib]", "strict_accuracy, numeric_accuracy to come first"),
        ("search.objectives=[speed]", "expected one of accuracy"),
        ("search.validation_share=0.9", "at most 0.5"),
        ("search.grace_share=0", "more than 0"),
        ("search=3", "search=3: expected a section with keys"),
    ],
)
def test_senseless_settings_are_refused_with_a_message(override, words):
    with pytest.raises(ConfigError, match="search") as caught:
        load_search(None, [override])
    assert words in str(caught.value)


def test_unknown_projection_is_refused_before_any_trial():
    with pytest.raises(ConfigError, match=r"target_modules has \['z_proj'\]"):
        sample_trials(RunConfig(), SearchConfig(num_trials=3, target_modules=("z_proj",)))


def test_search_may_be_widened_but_not_changed():
    config, search = RunConfig(), SearchConfig()
    same = hash_search(config, search)
    for free in ({"num_trials": 99}, {"retry_failed": True}, {"max_concurrent": 2}, {"objectives": ("accuracy",)}):
        assert hash_search(config, dataclasses.replace(search, **free)) == same
    tracked = dataclasses.replace(config, tracking=dataclasses.replace(config.tracking, wandb="offline"))
    assert hash_search(tracked, search) == same
    assert hash_search(config, dataclasses.replace(search, rank=(4,))) != same
    assert hash_search(dataclasses.replace(config, seed=1), search) != same


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_search_loads_under_its_own_name(path):
    config, search = load_search(path, [])
    assert config.name == f"search-{path.stem}"
    assert len(sample_trials(config, search)) == search.num_trials
    assert path.read_text().startswith("# ")
