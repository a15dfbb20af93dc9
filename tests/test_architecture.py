"""The stair: imports go down only, heavy packages stay in their rooms, files stay short. Read from the source by ast."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "finlora"
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = {file: ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in FILES}

# Lowest first. A room may import the rooms before it and, without a circle, itself.
STAIR = (
    *(
        "errors",
        "cpu",
        "working_dir",
        "signals",
        "host",
        "hub",
        "foreign_errors",
        "durable",
        "paper",
        "published",
        "config",
        "yamltext",
        "configfile",
        "precision",
        "results",
        "comparable",
        "pairing",
        "tables",
        "scores",
        "plots",
        "charts",
        "webpage",
        "report",
    ),
    *(
        "holdings",
        "lease",
        "cluster_probe",
        "cluster",
        "data",
        "terminal",
        "model",
        "engine",
        "evaluate",
        "train",
        "serve",
        "reproduce",
        "doctor",
        "cli",
    ),
)

# Where a heavy package may be imported at all: rooms, or modules of a room.
HOMES = {
    "ray": {
        *(
            "holdings",
            "lease",
            "cluster_probe",
            "cluster",
        ),  # what training, search, stages and serving ask of a cluster alike
        *(
            "train.worker",
            "train.room",
            "train.failure",
        ),  # Ray Train, and the callbacks that it calls, which subclass its own
        *(
            "train.search",
            "train.trial",
            "train.asha",
        ),  # Ray Tune, the body of a trial, and its scheduler, a subclass too
        *(
            "engine.pipeline",
            "engine.joining",
            "engine.leaving",
            "engine.lost_stages",
            "engine.waiting",
            "serve.app",
            "serve.fronts",
            "serve.model",
            "serve.measures",
            "serve.deploy",
            "doctor.nodes",
        ),
    },
    "deepspeed": {"train.data_parallel"},
    "bitsandbytes": {"model.base", "model.nf4", "model.quantised"},
    "cuda": {"model.cuda_source"},
    "typer": {"cli"},
}

# What help and mistakes must not wait for: these may not be imported while the module itself is.
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
}


def room(name):
    return name.split(".")[1]


def is_for_types_only(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def imports_of(file, *, at_import=False):
    """Return the modules that a file imports; `at_import`: only those that importing the file imports."""
    found = set()
    waiting = list(ast.parse(file.read_text(encoding="utf-8")).body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import hides where it goes"
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


def test_every_module_has_its_place_on_the_stair():
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


def test_ground_rooms_import_nothing_of_ours_but_errors():
    assert (
        GRAPH["finlora.errors"]
        == GRAPH["finlora.durable"]
        == GRAPH["finlora.paper"]
        == GRAPH["finlora.data.example"]
        == set()
    )
    assert GRAPH["finlora.config"] == {"finlora.errors"}
    assert GRAPH["finlora.results"] == {"finlora.durable", "finlora.errors"}
    assert GRAPH["finlora.train.sampler"] == GRAPH["finlora.evaluate.intervals"] == set()


def test_nobody_imports_the_entry_points():
    assert {room(name) for name, others in GRAPH.items() if "cli" in map(room, others)} == {"cli"}
    assert {room(name) for name, others in GRAPH.items() if "finlora.terminal" in others} == {"cli"}
    assert [name for name, others in GRAPH.items() if "finlora.cli.main" in others] == []
    users = {name for name, others in GRAPH.items() if "finlora.train.worker" in others}
    assert {name for name in users if room(name) != "cli"} <= {"finlora.train.trial", "finlora.reproduce.runner"}


@pytest.mark.parametrize("package", sorted(HOMES))
def test_heavy_package_stays_in_its_rooms(package):
    users = {
        NAMES[file].removeprefix("finlora.")
        for file in FILES
        if any(name.split(".")[0] == package for name in imports_of(file))
    }
    assert users
    assert {user for user in users if not {user, user.split(".")[0]} & HOMES[package]} == set()


LIGHT = (
    *("terminal", "errors", "signals", "host", "foreign_errors", "config", "configfile"),
    *("holdings", "lease", "cluster_probe", "cluster", "results", "report"),
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


def test_tests_mirror_the_package():
    """Each test module below tests/ROOM names a module of that room: test_MODULE.py, or test_MODULE_ASPECT.py."""
    rooms = [folder for folder in (ROOT / "tests").iterdir() if (PACKAGE / folder.name).is_dir()]
    assert len(rooms) >= 5
    strangers = [
        str(file.relative_to(ROOT))
        for folder in rooms
        for file in folder.glob("test_*.py")
        if not any(
            f"{file.stem}_".startswith(f"test_{module.stem}_") for module in (PACKAGE / folder.name).glob("*.py")
        )
    ]
    assert strangers == []


def test_test_files_have_names_of_their_own():
    """pytest imports a file by its module name: of two with one name, neither can be collected beside the other."""
    names = [module_name(file) for file in (ROOT / "tests").rglob("*.py") if file.name != "conftest.py"]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []


def module_name(file: Path) -> str:
    """Return the name under which pytest imports a file: its own, below those of the packages that hold it."""
    name = file.stem
    while (file.parent / "__init__.py").exists():
        file = file.parent
        name = f"{file.name}.{name}"
    return name
