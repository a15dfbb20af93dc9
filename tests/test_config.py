"""Settings: defaults < YAML < overrides; one error lists every fault, each with its correction."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import pytest

from finlora.config import LoraConfig, RunConfig
from finlora.configfile import (
    ADDED_LATER,
    config_from_tree,
    config_to_tree,
    load_config,
    save_config,
    settings_from_tree,
    tree_for_hash,
)
from finlora.errors import ConfigError


def write(tmp_path, text: str):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def faults_of(*overrides: str, path=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.faults


def test_without_file_and_overrides_come_the_defaults():
    assert load_config(None) == RunConfig()


def test_defaults_are_the_papers():
    config = RunConfig()
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (4, 32.0, 0.1)
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj")
    assert config.optim.learning_rate == 1e-4
    assert (config.model.bits, config.eval.bits, config.train.epochs) == (4, 8, 4)


def test_override_beats_file_beats_default(tmp_path):
    path = write(tmp_path, "name: mine\nlora:\n  rank: 8\n  alpha: 16\n")
    config = load_config(path, ["lora.rank=2"])
    assert (config.name, config.lora.rank, config.lora.alpha, config.lora.dropout) == ("mine", 2, 16.0, 0.1)


def test_later_override_wins():
    assert load_config(None, ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'"])
def test_learning_rate_reads_every_spelling(text):
    assert load_config(None, [f"optim.learning_rate={text}"]).optim.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("data.tasks=[fpb, tfns]", ("fpb", "tfns")),
        ("data.tasks=[ner]", ("ner",)),
        ('data.tasks=["x=y"]', ("x=y",)),
        ('data.tasks=["x #1"]', ("x #1",)),
    ],
)
def test_override_takes_lists(override, expected):
    assert load_config(None, [override]).data.tasks == expected


def test_override_takes_null_bool_and_spaces():
    config = load_config(None, [" eval.bits = null", "train.gradient_checkpointing=true", "lora.alpha=16", "name=a=b"])
    assert config.eval.bits is None
    assert config.train.gradient_checkpointing is True
    assert isinstance(config.lora.alpha, float)
    assert config.name == "a=b"


@pytest.mark.parametrize(
    "text",
    [
        *("my runs #1", "#1", "1e3", "123", "yes", "null", "~", "2024-01-01", "it's", '"quoted"', "[x", "a: b", "- a"),
        *("*x", "&x", "!tag", "@x", "%x", "a=b", "{x", "zürich", "C:\\runs", "|", "? x", "a\\n", "0x10"),
    ],
)
def test_text_setting_is_taken_as_it_was_typed(tmp_path, text):
    config = load_config(None, [f"output_dir={text}", f"model.base={text}"])
    assert (config.output_dir, config.model.base) == (text, text)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_text_that_may_be_unset_is_unset_by_null_alone():
    for text in ("null", "", "Null", "NULL"):
        assert load_config(None, ["model.tokenizer=x", f"model.tokenizer={text}"]).model.tokenizer is None
    for text in ("~", "none", "nil", "my model #2"):
        assert load_config(None, [f"model.tokenizer={text}"]).model.tokenizer == text


def test_choice_among_texts_is_read_as_text():
    """YAML reads `no` and `off` as false."""
    assert load_config(None, ["train.recompute=none", "train.device= cpu"]).train.recompute == "none"
    assert faults_of("train.recompute=no") == ["train.recompute='no': expected one of auto, none, mlp, layer"]


def test_every_users_texts_are_read_by_their_settings(tmp_path):
    from finlora.model.pretrain import PretrainConfig
    from finlora.serve.settings import read_settings
    from finlora.train.search.space import load_search

    served = read_settings({}, ["adapters_dir=/mnt/desk #2", "model.base=a: b", "keys_file=null", "stages.num=2"])
    assert (served.adapters_dir, served.model.base) == ("/mnt/desk #2", "a: b")
    assert (served.keys_file, served.stages.num) == (None, 2)
    config, search = load_search(None, ["name=x #2", "search.rank=[2,4]", "search.target_modules=[q_proj+v_proj]"])
    assert (config.name, search.rank, search.target_modules) == ("x #2", (2, 4), ("q_proj+v_proj",))
    assert settings_from_tree(PretrainConfig, {}, ["num_steps=7"]).num_steps == 7
    with pytest.raises(ConfigError, match=r"num_steps=7 #1.*found `#`"):
        settings_from_tree(PretrainConfig, {}, ["num_steps=7 #1"])


@pytest.mark.parametrize("where", ["file", "override"])
@pytest.mark.parametrize("number", ["010", "1:30", "-017", "1:30.5"])
def test_number_that_yaml_reads_in_another_base_is_refused(tmp_path, where, number):
    path, overrides = (
        (write(tmp_path, f"max_wait_s: {number}\n"), []) if where == "file" else (None, [f"seed={number}"])
    )
    with pytest.raises(ConfigError, match="base 8 or 60"):
        load_config(path, overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("name= x", "name=' x': found white space at its start or end"),
        ("output_dir=x ", "output_dir='x ': found white space at its start or end"),
        ("output_dir=", "output_dir='': found nothing, expected a text"),
        ("train.epochs=2 #3", "train.epochs=2 #3.: found `#`, expected a value without a comment"),
        ("data.tasks=[fpb] # one", "found `#`"),
        ("data.tasks=[fpb #1, ner]", "not valid YAML"),
        ("data.tasks=fpb,ner", r"data.tasks='fpb,ner': expected a list such as \[fpb, tfns\]"),
        ("train.epochs", "expected section.key=value"),
        ("=3", "expected section.key=value"),
        ("train.epochs=[1", "not valid YAML"),
        ("name.first=x", "did you mean|expected a text|expected a section"),
        ("train.epochs.x=3", "expected an integer"),
        ("train=3", "expected a section with keys"),
        ("model.bits=3", "model.bits=3: expected one of 16, 8, 4"),
        ("model.bits=true", "expected one of 16, 8, 4"),
        ("model.bits='4'", "expected one of 16, 8, 4"),
        ("model.bits=[4]", "expected one of 16, 8, 4"),
        ("lora.rank=0", "lora.rank=0: expected an integer of at least 1"),
        ("lora.rank=4097", "lora.rank=4097: expected an integer of at least 1 and at most 4,096"),
        ("lora.rank=4.0", "lora.rank=4.0: expected an integer"),
        ("lora.rank=true", "lora.rank=True: expected an integer"),
        ("lora.rank=", "lora.rank=None: expected an integer"),
        ("lora.alpha=1e9", r"lora.alpha=1000000000.0: expected more than 0 and less than 1e\+09"),
        ("lora.alpha=yes", "lora.alpha=True: expected a number"),
        ("lora.dropout=1", "expected 0 <= dropout < 1"),
        ("lora.target_modules=q_proj", "expected a list such as .q_proj, k_proj."),
        ("lora.target_modules=[q_prj]", "target_modules has .'q_prj'.: expected some of q_proj"),
        ("lora.target_modules=[]", "target_modules is empty"),
        ("data.tasks=[1]", r"data.tasks\[0\]=1: expected a text"),
        ("data.max_test_examples=0", "expected at least 1, or null for all"),
        ("optim.learning_rate=fast", "optim.learning_rate='fast': expected a number"),
        (
            "train.gpus_per_worker=0",
            "expected more than 0; to train without a GPU, set train.device=cpu and leave this out",
        ),
        ("eval.num_gpus=0", "expected more than 0; to evaluate without a GPU, set eval.device=cpu and leave this out"),
        ("optim.learning_rate=-1", "learning_rate=-1.0: expected more than 0"),
        ("optim.learning_rate=.nan", "optim.learning_rate=nan: expected a finite number"),
        ("optim.learning_rate=inf", "optim.learning_rate=inf: expected a finite number"),
        ("train.gradient_checkpointing=1", "expected true or false"),
        ("name=a/b", "expected a plain folder name"),
        ("name=..", "expected a plain folder name"),
        ("seed=-1", "seed=-1: expected at least 0"),
        ("train.num_workers=17", "global_batch_size=16 leaves some of 17 workers without an example"),
    ],
)
def test_wrong_setting_says_what_was_expected(override, words):
    with pytest.raises(ConfigError, match=words):
        load_config(None, [override])


def test_every_fault_is_reported_together(tmp_path):
    path = write(tmp_path, "model: {bits: 3, bas: x}\nlora: {rank: 0, dropout: 2}\ntrian: {}\n")
    faults = faults_of("optim.learning_rate=fast", "nonsense", path=path)
    expected = ["nonsense", "bits=3", "model.bas ", "lora.rank=0", "lora.dropout=2", "trian", "learning_rate='fast'"]
    for words in expected:
        assert any(words in fault for fault in faults), words
    assert len(faults) == len(expected)


def test_unknown_key_names_near_ones():
    (fault,) = faults_of("train.micro_batchsize=2")
    assert "train.micro_batchsize is not a setting: did you mean micro_batch_size" in fault
    (fault,) = faults_of("modle.bits=8")
    assert "did you mean model" in fault
    (fault,) = faults_of("epochs=2")
    assert fault == "epochs is not a setting: did you mean train.epochs?"


def test_unknown_key_without_near_one_lists_all():
    (fault,) = faults_of("lora.zzz=2")
    assert "rank or alpha or dropout or target_modules" in fault


def test_config_round_trips_through_yaml(tmp_path):
    config = load_config(
        None, ["optim.eps=1e-8", "data.tasks=[fpb,ner]", "eval.bits=null", "name=zürich", "model.bits=16"]
    )
    path = tmp_path / "new" / "config.yaml"
    save_config(config, path)
    assert load_config(path) == config
    assert config_from_tree(config_to_tree(config)) == config


def test_config_from_tree_checks_like_a_file():
    tree = config_to_tree(RunConfig())
    tree["lora"]["rank"] = 0
    with pytest.raises(ConfigError, match="rank=0"):
        config_from_tree(tree)


def test_missing_file_points_to_examples(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml does not exist: see jobs/configs/"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "is not valid YAML"),
        ("- a\n- b\n", "holds a list: expected sections"),
        ("just text", "holds a str: expected sections"),
        ("", "is empty, as after a copy that was cut off: expected sections"),
        ("model: 3", "model=3: expected a section with keys"),
        ("3: x", "3 is not a setting"),
    ],
)
def test_wrong_yaml_is_refused(tmp_path, text, words):
    with pytest.raises(ConfigError, match=words):
        load_config(write(tmp_path, text))


def test_unreadable_file_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_file_of_comments_gives_defaults_and_takes_overrides(tmp_path):
    assert load_config(write(tmp_path, "# nothing yet\n"), ["lora.rank=8"]).lora.rank == 8


def test_empty_section_gives_its_defaults(tmp_path):
    path = write(tmp_path, "lora:\n  # rank: 8\ntrain:\n")
    assert load_config(path) == RunConfig()
    assert load_config(path, ["lora.rank=8"]).lora.rank == 8


def test_config_is_frozen_and_checks_itself():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RunConfig().seed = 1
    with pytest.raises(ConfigError, match=r"lora\.rank=0"):
        LoraConfig(rank=0)


def test_key_that_occurs_twice_is_refused(tmp_path):
    """PyYAML takes the last, so a run would differ from its file's first lines."""
    (tmp_path / "x.yaml").write_text("train:\n  epochs: 1\n  num_workers: 2\n  epochs: 3\n")
    with pytest.raises(
        ConfigError, match=r"is not valid YAML: found the key 'epochs' twice: write it once, line 4, column 3"
    ):
        load_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("name", "words"),
    [("a\nb", "expected a name on one line, without control characters"), ("n" * 129, "expected at most 128 bytes")],
)
def test_name_that_no_folder_should_have_is_refused(name, words):
    with pytest.raises(ConfigError, match=words):
        RunConfig(name=name)


@pytest.mark.parametrize(
    ("override", "fault"),
    [
        ("tracking.mlflow=mlflow.db", "tracking.mlflow=mlflow.db: expected sqlite:///PATH (four slashes before an"),
        ("tracking.mlflow=sqlite:///", "tracking.mlflow=sqlite:///: expected sqlite:///PATH"),
        ("tracking.mlflow=offline", "tracking.mlflow=offline: expected sqlite:///PATH"),
        ("tracking.wandb=true", "tracking.wandb=true: expected offline or http(s)://HOST"),
        (
            "tracking.wandb=https://me:word@host",
            "tracking.mlflow and tracking.wandb are written into the folder of the run",
        ),
        ("tracking.project=a/b", "tracking.project='a/b': expected a name without a slash"),
    ],
)
def test_tracking_takes_addresses_without_passwords(override, fault):
    (found,) = faults_of(override)
    assert found.startswith(fault)
    assert "word@" not in found


@pytest.mark.parametrize("address", ["sqlite:////m/a@b.db", "http://h:5000", "https://h/path"])
def test_tracking_takes_a_file_and_a_server(address):
    assert load_config(None, [f"tracking.mlflow={address}"]).tracking.mlflow == address


def test_a_setting_that_came_later_leaves_the_hash_of_runs_without_it():
    changes = [
        *(
            "model.template_date=2025-03-09",
            "lora.rslora=true",
            "lora.rank_pattern={q_proj: 2}",
            "lora.alpha_pattern={q_proj: 2}",
            "lora.init=olora",
            "lora.dora=true",
            "optim.lora_plus_ratio=16",
        ),
    ]
    assert [change.split("=")[0] for change in changes] == list(ADDED_LATER)
    tree = tree_for_hash(load_config(None, ["model.template=chat"]))
    assert not [name for name in ADDED_LATER if name.split(".")[1] in tree[name.split(".")[0]]]
    settings = ["model.template=chat", "model.bits=16"]
    trees = [tree_for_hash(load_config(None, [*settings, *own])) for own in ([], *([change] for change in changes))]
    assert len({json.dumps(each, sort_keys=True) for each in trees}) == len(trees), "each counts once it is set"


def test_a_new_setting_says_what_runs_without_it_computed():
    """A hash of all settings' names, so that adding one without its line in ADDED_LATER fails here: it would start runs anew."""
    tree = tree_for_hash(RunConfig())
    names = sorted(f"{name}.{key}" for name, value in tree.items() if isinstance(value, dict) for key in value)
    found = hashlib.sha256(" ".join(names).encode()).hexdigest()[:16]
    assert found == "daf6c600f4db5790", (
        "a setting was added: name its neutral value in finlora/configfile.py, ADDED_LATER, not a new hash here"
    )
