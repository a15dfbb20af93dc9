"""The import stair: imports go down only, heavy packages stay in their rooms, files stay short. Parses the source."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finlora"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}

# Lowest first; a room is a folder, or a module outside any folder. A room may import the rooms before it and, without a
# circle, itself. So neither files nor folders import each other in a circle.
STAIR = (
    *(
        "errors",
        "machine",
        "durable",
        "formula",
        "config",
        "yamltext",
        "printed_table",
        "configfile",
        "precision",
        "results",
        "cluster",
    ),
    *("data", "data.raw", "data.taskfile", "data.tasks", "data.sets", "data.pretraining", "report", "terminal"),
    "optim",  # below the models: the memory forecast needs the size of an optimiser's state
    *("model.kernels", "model.rowwise", "model.memory", "model", "model.layers"),
    *("grammar", "engine", "stage", "pipeline", "inference", "evaluate", "score", "card", "exchange"),
    *("train.steps", "train.run", "train.tracking", "train", "train.search"),
    *("serve", "serve.accounts", "serve.live", "serve.http", "serve.deploy"),
    "feedback",
    *("reproduce", "doctor", "cli"),
)

# Rooms, or modules of a room, that may import a heavy package.
HOMES = {
    "ray": {
        "cluster",  # cluster functions of training, search, stages and serving
        *("pipeline.pipeline", "pipeline.graph", "pipeline.ray_workarounds"),  # stages as actors
        *(
            "train.worker",
            "train.run.wait_for_gpus",
            "train.run.failure",
        ),  # Ray Train and subclasses of its callbacks
        *("train.search.search", "train.search.run_trial", "train.search.asha"),  # Ray Tune
        *("serve.served_model", "serve.accounts.prometheus", "serve.deploy"),
        "score.pool",  # Ray Data
        "reproduce.at_once",  # steps as actors
        "doctor.nodes",
    },
    "deepspeed": {"train.data_parallel"},
    "bitsandbytes": {"model.base", "model.kernels.nf4", "model.quantised"},
    "cuda": {"model.kernels.compile_cuda"},
    "typer": {"cli"},
    "mlflow": {"train.tracking.mlflow_tracker"},
    "wandb": {"train.tracking.wandb_tracker"},
    "llguidance": {"grammar", "stage.grammar_masks"},
}

# Files below 40 lines, each with the reason for a separate file.
CRUMBS = {
    "machine.heap": "long runs of any room may need it, and no other file of the machine is about memory",
    "model.git_lfs": "the readers of weights and of tokenizers both need it, and neither imports the other",
    "model.memory.peak": "training and stages measure alike; forecasts import no torch",
    "engine.interface": "evaluation imports the engine's interface, but no engine",
    "data.example": "the record that every room passes on, without an import",
    "model.kernels.launch": "asked by layers, which import no kernel before they launch one",
    "model.kernels.rms_norm": "a kernel a file",
    "optim.adamw": "an optimiser a file",
    "train.run.failure": "raised by workers and read by drivers",
    "train.tracking.tensorboard_tracker": "a tracking system a file",
}

# Packages that would delay help and error messages: importing the module must not import them.
SLOW = {
    "torch",
    "transformers",
    "peft",
    "ray",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "sklearn",
    "matplotlib",
    "numpy",
    "llguidance",
}


def own_name(name):
    return name.removeprefix("finlora.")


def room(name):
    """Return the folder of a module, or its name if it is in none."""
    return own_name(name).rpartition(".")[0] or own_name(name)


def is_for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(file, *, at_import=False):
    """Return the modules that a file imports; with `at_import` only those outside functions."""
    found = set()
    waiting = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides its target"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if name in NAMES.values()} or {node.module}
        if at_import and (isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or is_for_types_only(node)):
            continue
        waiting += ast.iter_child_nodes(node)
    return found


GRAPH = {
    NAMES[file]: {name for name in imports_of(file) if name in NAMES.values()}
    for file in FILES
    if file.name != "__init__.py"
}


def test_every_module_has_a_step_of_the_stair():
    assert {room(name) for name in GRAPH} <= set(STAIR)
    assert len(GRAPH) > 30


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_imports_go_down_only(name):
    own = STAIR.index(room(name))
    upward = {other for other in GRAPH[name] if STAIR.index(room(other)) > own}
    assert upward == set()


def test_no_imports_run_in_a_circle():
    order = list(TopologicalSorter(GRAPH).static_order())  # raises CycleError with the circle
    assert set(order) >= set(GRAPH)


def test_folders_of_the_package_do_not_import_one_another_in_a_circle():
    """Here a folder with its subfolders is one room: code that both model/ and train/ need is a separate room."""
    graph = {}
    for name, others in GRAPH.items():
        own = own_name(name).split(".")[0]
        graph.setdefault(own, set()).update({own_name(other).split(".")[0] for other in others} - {own})
    assert set(TopologicalSorter(graph).static_order()) >= set(graph)  # raises CycleError with the circle


def test_ground_rooms_import_nothing_of_ours_but_errors():
    assert (
        GRAPH["finlora.errors"]
        == GRAPH["finlora.durable"]
        == GRAPH["finlora.report.paper"]
        == GRAPH["finlora.data.example"]
        == GRAPH["finlora.formula.families"]
        == set()
    )
    assert GRAPH["finlora.formula.llama"] == {"finlora.formula.families"}
    assert GRAPH["finlora.config"] == {"finlora.errors", "finlora.formula.lora_config"}
    assert GRAPH["finlora.results"] == {"finlora.durable", "finlora.errors"}
    assert GRAPH["finlora.train.steps.sampler"] == GRAPH["finlora.evaluate.intervals"] == set()


def test_nobody_imports_the_entry_points():
    assert {room(name) for name, others in GRAPH.items() if "cli" in map(room, others)} == {"cli"}
    assert {room(name) for name, others in GRAPH.items() if "finlora.terminal" in others} == {"cli"}
    assert [name for name, others in GRAPH.items() if "finlora.cli.main" in others] == []
    users = {name for name, others in GRAPH.items() if "finlora.train.worker" in others}
    assert {name for name in users if room(name) != "cli"} <= {
        "finlora.train.search.run_trial",
        "finlora.reproduce.run_rows",
    }


@pytest.mark.parametrize("package", sorted(HOMES))
def test_heavy_package_stays_in_its_rooms(package):
    users = {
        NAMES[file].removeprefix("finlora.")
        for file in FILES
        if any(name.split(".")[0] == package for name in imports_of(file))
    }
    assert users
    homes = HOMES[package]
    assert {user for user in users if not any(f"{user}.".startswith(f"{home}.") for home in homes)} == set()


LIGHT = (
    *("terminal", "errors", "config", "configfile", "results", "report.write"),
    *("machine.signals", "machine.host", "machine.foreign_errors"),
    *("cluster.holdings", "cluster.lease", "cluster.probe", "cluster.connect"),
)


@pytest.mark.parametrize("name", sorted(f"finlora.{name}" for name in LIGHT) + [n for n in GRAPH if room(n) == "cli"])
def test_light_module_imports_nothing_slow(name):
    file = next(file for file in FILES if NAMES[file] == name)
    assert {other.split(".")[0] for other in imports_of(file, at_import=True)} & SLOW == set()


def test_package_folders_have_empty_init_files():
    folders = {file.parent for file in FILES}
    assert [folder for folder in folders if (folder / "__init__.py").read_bytes() != b""] == []


def test_no_file_is_over_400_lines():
    files = [*FILES, *(ROOT / "jobs").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    long = {str(file.relative_to(ROOT)): n for file in files if (n := len(file.read_text().splitlines())) > 400}
    assert long == {}


def test_no_folder_holds_over_15_files():
    """__init__.py counts. A larger folder is split into two rooms."""
    folders = {file.parent for file in [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "jobs").rglob("*.py")]}
    many = {str(folder.relative_to(ROOT)): n for folder in folders if (n := len([*folder.glob("*.*")])) > 15}
    assert many == {}


def test_no_module_name_occurs_twice_in_the_package():
    names = [file.stem for file in FILES if file.stem != "__init__"]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []


def test_no_file_is_a_crumb_without_a_reason():
    small = {own_name(NAMES[file]) for file in FILES if 0 < len(file.read_text().splitlines()) < 40}
    assert small <= set(CRUMBS)


def test_tests_mirror_the_package():
    """Each test module below tests/ROOM names a module of that room: test_MODULE.py, or test_MODULE_ASPECT.py."""
    rooms = [
        folder for folder in (ROOT / "tests").rglob("*") if (PACKAGE / folder.relative_to(ROOT / "tests")).is_dir()
    ]
    rooms = [folder for folder in rooms if [*(PACKAGE / folder.relative_to(ROOT / "tests")).glob("*.py")]]
    assert len(rooms) >= 15
    strangers = []
    for folder in rooms:
        modules = [file.stem for file in (PACKAGE / folder.relative_to(ROOT / "tests")).glob("*.py")]
        for file in folder.glob("test_*.py"):
            if not any(f"{file.stem}_".startswith(f"test_{module}_") for module in modules):
                strangers.append(str(file.relative_to(ROOT)))
    assert strangers == []


def test_test_files_have_names_of_their_own():
    """pytest imports a file by its module name, so two files of one name cannot be collected together."""
    names = [module_name(file) for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py"]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []


def module_name(file: Path) -> str:
    """Return the name under which pytest imports a file: its own after those of its packages."""
    name = file.stem
    while (file.parent / "__init__.py").exists():
        file = file.parent
        name = f"{file.name}.{name}"
    return name


WALL_CLOCK = {
    "finlora/card/approvals.py": "date of an approval",
    "finlora/doctor/facts.py": "compares the clocks of nodes",
    "finlora/doctor/nodes.py": "compares the clocks of nodes",
    "finlora/durable.py": "age of a file, whose lock decides",
    "finlora/pipeline/ray_workarounds.py": "age of a file, whose dead owner decides",
    "finlora/results.py": "date of a result, never before that of the line above",
    "finlora/serve/accounts/audit.py": "date of a question",
    "finlora/serve/http/completions.py": "date of an answer in OpenAI's form",
    "finlora/serve/http/responses.py": "date of an answer in OpenAI's form",
    "finlora/serve/http/status.py": "date of the server's start in OpenAI's form",
    "finlora/train/run/attempts.py": "date of an attempt; its seconds are monotonic",
}


def test_a_clock_that_is_set_changes_no_wait_and_no_duration():
    """The wall clock jumps, when it is set or a machine was suspended: only dates and ages of files are read from it."""
    calls = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    found = set()
    for path in sorted((ROOT / "finlora").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.Call) and ast.unparse(node.func) in calls for node in ast.walk(tree)):
            found.add(path.relative_to(ROOT).as_posix())
    assert found == set(WALL_CLOCK)
