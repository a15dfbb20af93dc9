"""The pages of docs/ and README: links and files exist, and the code raises the quoted messages."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from finlora.configfile import load_config
from finlora.data.sets.catalog import TASKS
from finlora.machine import cpu
from finlora.model.contract import Contract
from finlora.train.run import run_folder

ROOT = Path(__file__).resolve().parents[1]
PAGES = {str(path.relative_to(ROOT / "docs")): path for path in sorted((ROOT / "docs").rglob("*.md"))}
ROOT_PAGES = {path.name: path for path in sorted(ROOT.glob("*.md"))}
OUR_OWN = {
    *("DS_ACCELERATOR", "LOCAL_RANK", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"),
    *("MLFLOW_DISABLE_TELEMETRY", "WANDB_ERROR_REPORTING"),
}
"""Variables that the code sets for libraries, whatever the user has set."""
SOURCE = "\n".join(path.read_text() for path in (ROOT / "finlora").rglob("*.py"))
# Joins string literals that are split over lines.
SOURCE = re.sub(r'"\s*\n\s*f?"', "", SOURCE)


def anchors_of(path):
    """Return the anchors of a page's headings, as Python-Markdown and GitHub make them from ASCII titles."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"\]\([^)]*\)", "", title) for title in titles]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in plain}


def broken_links(path):
    """Return the links of a page to missing files or headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if "://" in link or link.startswith("mailto:"):
            continue
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", [*PAGES, *ROOT_PAGES])
def test_links_and_paths_lead_to_files(page):
    path = PAGES.get(page) or ROOT_PAGES[page]
    assert broken_links(path) == []
    paths = re.findall(
        r"`((?:jobs|benchmarks|requirements|finlora|tests|cluster|docs|serve_configs)/[\w./-]*)`", path.read_text()
    )
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_broken_link_and_anchor_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A `key`, told\n[a](#a-key-told) [b](page.md#a-key-told) [c](#b) [d](none.md) [e](https://x.org/y)\n"
    )
    assert broken_links(page) == ["#b", "none.md"]


@pytest.mark.parametrize("page", PAGES)
def test_page_is_in_the_sites_navigation(page):
    assert re.search(rf": {re.escape(page)}$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)


@pytest.fixture
def generator(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("generate")


def test_reference_is_what_the_code_says(generator, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generator.main() == 0, capsys.readouterr().out + "run python docs/generate.py"


def test_stale_page_is_named_with_the_command_and_written_again(generator, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert generator.main() == 1
    assert "docs/reference/errors.md is out of date: run python docs/generate.py\n" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sys.argv", ["generate.py"])
    assert generator.main() == 0
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {name: (ROOT / "docs" / "reference" / name).read_text() for name in written}
    assert len(written) == 9


def test_setting_without_text_is_refused(generator):
    @dataclasses.dataclass
    class Bare:
        told: int = 1
        """A text."""
        untold: int = 2

    with pytest.raises(LookupError, match=r"Bare: no string follows untold$"):
        generator.texts_of(Bare)


def test_every_environment_variable_that_the_code_reads_is_in_the_reference():
    read = set(re.findall(r"environ(?:\.get|\.setdefault)?[\[(]\"([A-Z_]+)\"", SOURCE)) | set(cpu.ENVIRONMENT)
    assert len(read) > 15
    page = PAGES["reference/environment.md"].read_text()
    assert [name for name in sorted(read - OUR_OWN) if f"`{name}`" not in page] == []


def test_files_of_a_run_and_keys_of_a_contract_are_in_the_reference():
    page = PAGES["reference/folders.md"].read_text()
    files = re.findall(r"^    (\S+) {2,}", run_folder.__doc__, flags=re.MULTILINE)
    assert len(files) > 10
    keys = [field.name for field in dataclasses.fields(Contract)]
    assert [name for name in (*files, *keys) if f"`{name}`" not in page] == []


@pytest.mark.parametrize("page", PAGES)
def test_settings_that_a_page_names_exist(page):
    named = re.findall(
        r"`((?:model|lora|data|optim|train|eval|tracking)\.\w+|max_wait_s)\b(?!/)", PAGES[page].read_text()
    )
    known = load_config(None, [])
    for name in named:
        part = known
        for key in name.split("."):
            assert hasattr(part, key), name
            part = getattr(part, key)


def test_each_task_has_a_page_with_its_licence_and_defects():
    pages = {page: path.read_text() for page, path in PAGES.items() if page.startswith("reference/tasks/")}
    for task in TASKS.values():
        (page,) = [
            page
            for page, text in pages.items()
            if re.search(rf"^# .*\b{task.name}\b", text)
            or (task.family == "synthetic" and page == "reference/tasks/synthetic.md")
        ]
        assert re.search(rf"^\|? ?.*{re.escape(task.licence)}", pages[page], flags=re.MULTILINE), task.name
        assert "## Defects" in pages[page]


def test_messages_in_troubleshooting_are_raised_by_us_or_named_as_others():
    quoted = re.findall(r"^### `([^`]+)`", PAGES["how-to/troubleshooting.md"].read_text(), flags=re.MULTILINE)
    assert len(quoted) >= 8
    theirs = {"No available agent to submit job", "Maximum request body size 104857600 exceeded", "/readyz"}
    theirs |= {"NCCL error", "Duplicate GPU detected", "finlora plan", "ray job submit", "No such file"}
    parts = [part.strip(" ,:") for message in quoted if message not in theirs for part in message.split("...")]
    assert [part for part in parts if part and part not in SOURCE] == []
