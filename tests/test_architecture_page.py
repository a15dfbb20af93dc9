"""ARCHITECTURE.md lists every module once and no missing one; its picture shows the current imports."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ADVICE = "run .venv/bin/python docs/architecture.py"


@pytest.fixture(scope="module")
def generator():
    spec = importlib.util.spec_from_file_location("architecture", ROOT / "docs" / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_file_has_its_line_and_no_line_names_a_missing_file(generator):
    """The list of files is the generator's, which lists the tree."""
    text = generator.PAGE.read_text(encoding="utf-8")
    assert text == generator.write_page(text), ADVICE
    files = [str(path.relative_to(ROOT / "finlora")) for path in [*generator.MODULES, *generator.KERNELS]]
    listed = []
    for title, table in re.findall(r"^### (\S+)/\n\n((?:\|.*\n)+)", generator.list_files(), flags=re.MULTILINE):
        folder = "" if title == "finlora" else f"{title}/"
        listed += [folder + name for name in re.findall(r"^\| `([^`]+)` \| \S", table, flags=re.MULTILINE)]
    assert sorted(listed) == sorted(files), "each with its sentence"


def test_first_sentence_of_a_file(generator, tmp_path):
    module, kernel = tmp_path / "a.py", tmp_path / "a.cu"
    module.write_text('"""Reader of config.yaml\nand its rows. More.\n\nMore still.\n"""\n')
    kernel.write_text("// Product of few rows,\n// at 4 bit. More.\n#include <x>\n")
    assert generator.first_sentence(module) == "Reader of config.yaml and its rows."
    assert generator.first_sentence(kernel) == "Product of few rows, at 4 bit."


def test_prose_names_modules_that_are_there(generator):
    named = generator.named_modules(generator.PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    assert [name for name in sorted(named) if not any((ROOT / top / name).is_file() for top in ("", "finlora"))] == []


def test_picture_shows_todays_imports(generator):
    assert generator.STAIR.read_text(encoding="utf-8") == generator.draw_stair(), ADVICE


def test_floors_follow_the_imports_and_a_circle_is_refused(generator):
    imports = {"cli": {"train", "errors"}, "train": {"errors"}, "errors": set()}
    assert generator.floors_of(imports) == {"errors": 0, "train": 1, "cli": 2}
    assert generator.without_detours(imports) == {"cli": {"train"}, "train": {"errors"}, "errors": set()}
    with pytest.raises(ValueError, match=r"circle: \['a', 'b'\]"):
        generator.floors_of({"a": {"b"}, "b": {"a"}})


def test_page_without_its_marks_is_refused(generator):
    with pytest.raises(ValueError, match="lacks the two lines"):
        generator.write_page("# Architecture\n")
